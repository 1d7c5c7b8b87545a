"""Exports: a finished run, with its own adapter or a trained one, as other programs read it.

To add one: one file with a subclass of Export, and one line in EXPORTS.
"""

from __future__ import annotations

from typing import Any

from qinit.exports.base import Export
from qinit.exports.bnb_nf4 import BnbNf4Export
from qinit.exports.compressed_tensors import CompressedTensorsExport
from qinit.exports.dense import DenseExport
from qinit.exports.finished import FinishedRun
from qinit.exports.gguf import GgufExport
from qinit.exports.gptq import AutoRoundExport, GptqExport
from qinit.exports.mlx import MlxExport

EXPORTS: dict[str, Export[Any]] = {
    export.name: export
    for export in (
        DenseExport(),
        GgufExport(),
        MlxExport(),
        CompressedTensorsExport(),
        GptqExport(),
        AutoRoundExport(),
        BnbNf4Export(),
    )
}

__all__ = [
    "EXPORTS",
    "AutoRoundExport",
    "BnbNf4Export",
    "CompressedTensorsExport",
    "DenseExport",
    "Export",
    "FinishedRun",
    "GgufExport",
    "GptqExport",
    "MlxExport",
]
