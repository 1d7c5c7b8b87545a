"""MLX, Apple's arrays, and mlx-lm, its language models."""

from qinit.exports.mlx.export import MlxExport

__all__ = ["MlxExport"]
