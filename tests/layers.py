"""Layers as trained models have them, to try solvers on: weights, and what such a layer sees."""

from __future__ import annotations

import numpy as np
import torch

from qinit.solver.statistics import Statistics
from tests.helpers import gauss

ROWS, COLUMNS, RANK, GROUP = 48, 192, 8, 64
KINDS = ("normal", "low-rank plus noise", "heavy-tailed")


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def symmetric_root(hessian: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(hessian)
    return vectors @ np.diag(np.sqrt(np.maximum(values, 0))) @ vectors.T


def weights(rows: int = ROWS, columns: int = COLUMNS, seed: int = 0, structure: float = 1.0) -> torch.Tensor:
    """Noise and `structure` times a rank-4 part, as large as trained weights are."""
    low_rank = gauss(rows, 4, seed=seed + 1) @ gauss(4, columns, seed=seed + 2)
    return 0.02 * (gauss(rows, columns, seed=seed) + structure * low_rank)


def of_kind(kind: str, rows: int = 64, columns: int = 128, seed: int = 0) -> torch.Tensor:
    """Weights of one of KINDS, as large as trained ones are."""
    random = np.random.default_rng(seed)
    if kind == "low-rank plus noise":
        values = random.normal(size=(rows, 12)) @ random.normal(size=(12, columns)) / 3 + random.normal(
            size=(rows, columns)
        )
    elif kind == "heavy-tailed":
        values = random.standard_t(3, size=(rows, columns))
    else:
        values = random.normal(size=(rows, columns))
    return torch.from_numpy(0.02 * values).float()


def statistics(columns: int = COLUMNS, rows: int = ROWS, tokens: int = 512, seed: int = 9) -> Statistics:
    """Correlated inputs with a few loud channels; fewer tokens than columns make H singular."""
    mixing = torch.eye(columns) + 0.3 * gauss(columns, columns, seed=seed) / columns**0.5
    loud = torch.ones(columns)
    loud[:: max(columns // 5, 1)] = 8.0
    x = (gauss(tokens, columns, seed=seed + 1) @ mixing * loud).double()
    fisher = gauss(rows, columns, seed=seed + 2).square() * gauss(rows, 1, seed=seed + 3).exp() * loud
    return Statistics((x.T @ x / tokens).float(), x.abs().mean(0).float(), tokens, fisher=fisher)


def correlated(columns: int, tokens: int | None = None, seed: int = 0) -> torch.Tensor:
    """H of inputs that share a few directions, as a layer's do; singular when `tokens` are fewer than columns."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * 0.93 ** torch.arange(columns)
    x = torch.randn(tokens or 8 * columns, columns, generator=generator)
    x = x @ mixing.T + 0.3 * torch.randn(len(x), columns, generator=generator)
    return x.T @ x / len(x)


def decaying(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A matrix with singular values 1, 0.8, 0.64, ... as weights have, not the flat ones of noise."""
    size = min(rows, columns)
    U, V = torch.linalg.qr(gauss(rows, size, seed=seed)).Q, torch.linalg.qr(gauss(columns, size, seed=seed + 1)).Q
    return U * 0.8 ** torch.arange(size) @ V.T


def fading(columns: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """H of inputs with a decaying spectrum; singular when there are fewer tokens than columns."""
    x = gauss(tokens, columns, seed=seed) * 0.95 ** torch.arange(columns) @ gauss(columns, columns, seed=seed + 1)
    return x.T @ x / tokens


def output_error(matrix: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(M H M'), float64."""
    matrix = matrix.double()
    return float(((matrix @ hessian.double()) * matrix).sum())
