"""The published methods once more, in float64 from their papers."""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import norm as normal

from qinit.grids.integer.rounding import round_gptq
from qinit.solver.methods import METHODS, Method
from qinit.solver.residual import as_loaded
from qinit.solver.spec import LayerSpec
from qinit.solver.statistics import Statistics
from tests.layers import GROUP, RANK, array, symmetric_root


def spec(method: str | Method, bits: int = 2, rank: int = RANK, storage=None) -> LayerSpec:
    row = METHODS[method] if isinstance(method, str) else method
    return LayerSpec(row, bits, GROUP, rank, row.iterations, storage)


def product(solution) -> np.ndarray:
    return array(solution.low_rank.B) @ array(solution.low_rank.A)


def norm_under(matrix: np.ndarray, layer_spec: LayerSpec, seen: Statistics) -> float:
    if layer_spec.method.metric == "fisher":
        return float(np.sqrt((array(seen.fisher) * matrix**2).sum()))
    return float(np.sqrt(max(np.trace(matrix @ array(seen.hessian) @ matrix.T), 0)))


# The papers' algorithms.


def min_max(weight: np.ndarray, bits: int) -> np.ndarray:
    """Asymmetric rounding to nearest, one float16 scale and one zero point per group."""
    groups = weight.reshape(len(weight), -1, GROUP)
    low, high = np.minimum(groups.min(-1, keepdims=True), 0), np.maximum(groups.max(-1, keepdims=True), 0)
    scale = (high - low) / (2**bits - 1)
    zero = np.floor(-low / scale + 0.5)
    scale = scale.astype(np.float32).astype(np.float16).astype(np.float64)
    codes = np.clip(np.floor(groups / scale + 0.5) + zero, 0, 2**bits - 1)
    return ((codes - zero) * scale).reshape(weight.shape)


def normal_float(weight: np.ndarray, bits: int) -> np.ndarray:
    positive = normal.ppf(np.linspace(0.9677083, 0.5, 2 ** (bits - 1) + 1)[:-1])
    negative = -normal.ppf(np.linspace(0.9677083, 0.5, 2 ** (bits - 1))[:-1])
    table = np.sort(np.concatenate([positive, [0.0], negative])) / positive.max()
    blocks = weight.reshape(-1, GROUP)
    absmax = np.abs(blocks).max(1, keepdims=True)
    return (table[np.abs(blocks[..., None] / absmax[..., None] - table).argmin(-1)] * absmax).reshape(weight.shape)


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def loftq(weight: np.ndarray, bits: int, rank: int, rounds: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """LoftQ, arXiv:2310.08659, algorithm 1."""
    low_rank = np.zeros_like(weight)
    for _ in range(rounds):
        quantized = normal_float(weight - low_rank, bits)
        low_rank = truncated(weight - quantized, rank)
    return quantized, low_rank


def qpissa(weight: np.ndarray, bits: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """QPiSSA, arXiv:2404.02948: the principal part goes to the adapter, the rest is quantized."""
    low_rank = truncated(weight, rank)
    return normal_float(weight - low_rank, bits), low_rank


def triplets(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank], S[:rank], Vh[:rank]


Answer = tuple[np.ndarray, np.ndarray, np.ndarray]  # Q [out, in], B [out, r], A [r, in]


def lqer(weight: np.ndarray, seen: Statistics, bits: int) -> Answer:
    """L2QER: SVD of diag(s) E', A = diag(s)^-1 U and B = S V' there; both transposed here."""
    s = np.maximum(array(seen.magnitude), 1e-4)
    s /= np.sqrt(s.min() * s.max())
    quantized = min_max(weight, bits)
    U, S, Vh = triplets(np.diag(s) @ (weight - quantized).T, RANK)
    return quantized, (np.diag(S) @ Vh).T, (np.diag(1 / s) @ U).T


def qera(weight: np.ndarray, seen: Statistics, bits: int) -> Answer:
    """QERA-exact: A = R^-1/2 U, B = S V' for the SVD of R^1/2 E'."""
    root = symmetric_root(array(seen.hessian))
    quantized = min_max(weight, bits)
    U, S, Vh = triplets(root @ (weight - quantized).T, RANK)
    return quantized, (np.diag(S) @ Vh).T, np.linalg.solve(root, U).T


def eora(weight: np.ndarray, seen: Statistics, bits: int) -> Answer:
    """EoRA: project E on the eigenvectors, each by the root of its eigenvalue, and share the singular values out."""
    target = torch.from_numpy(weight).float()
    rounded = round_gptq(target, seen.hessian, bits=bits, group_size=GROUP, search="minmax")[0]
    quantized = array(as_loaded(rounded, spec("eora", bits)))
    values, vectors = np.linalg.eigh(array(seen.hessian))
    U, S, Vh = triplets((weight - quantized) @ vectors @ np.diag(np.sqrt(values)), RANK)
    return quantized, U * np.sqrt(S), np.sqrt(S)[:, None] * Vh @ np.diag(values**-0.5) @ vectors.T


def cloq(weight: np.ndarray, seen: Statistics, bits: int) -> Answer:
    """CLoQ, theorem 3.1: A = R^-1 U S and B = V for the SVD of R E', R = diag(sqrt(values)) vectors' of H + ridge."""
    reduced = torch.from_numpy(magr(weight, array(seen.hessian))).float()
    rounded = round_gptq(reduced, seen.hessian, bits=bits, group_size=GROUP, search="minmax")[0]
    quantized = array(as_loaded(rounded, spec("cloq", bits)))
    hessian = array(seen.hessian)
    values, vectors = np.linalg.eigh(hessian + 0.01 * np.trace(hessian) / len(hessian) * np.eye(len(hessian)))
    root = np.diag(np.sqrt(values)) @ vectors.T
    U, S, Vh = triplets(root @ (weight - quantized).T, RANK)
    return quantized, Vh.T, (np.linalg.solve(root, U) * S).T


def magr(weight: np.ndarray, hessian: np.ndarray, strength: float = 1e-4, steps: int = 200) -> np.ndarray:
    """Proximal gradient; the projection on the l1 ball finds its threshold by bisection."""
    hessian = hessian / np.linalg.norm(hessian, 2)
    result = weight
    for _ in range(steps):
        x = (result - (result - weight) @ hessian).reshape(len(weight), -1, GROUP) / strength
        low, high = np.zeros(x.shape[:2]), np.abs(x).max(-1)
        for _ in range(60):
            middle = (low + high) / 2
            outside = np.maximum(np.abs(x) - middle[..., None], 0).sum(-1) > 1
            low, high = np.where(outside, middle, low), np.where(outside, high, middle)
        projected = np.sign(x) * np.maximum(np.abs(x) - high[..., None], 0)
        inside = np.abs(x).sum(-1, keepdims=True) <= 1
        result = (strength * (x - np.where(inside, x, projected))).reshape(weight.shape)
    return result


def srr_rank(weight: np.ndarray, root: np.ndarray, rank: int, seed: int) -> int:
    def left(matrix: np.ndarray, p: int) -> float:
        U, S, Vh = triplets(matrix, p)
        return float(np.linalg.norm(matrix - U @ np.diag(S) @ Vh) ** 2 / np.linalg.norm(matrix) ** 2)

    probe = array(torch.rand(*weight.shape, generator=torch.Generator().manual_seed(seed))) * 2 - 1
    predicted = [left(root @ weight.T, k) * left(root @ probe.T, rank - k) for k in range(rank + 1)]
    return int(np.argmin(predicted))


def srr(weight: np.ndarray, seen: Statistics, bits: int) -> Answer:
    """SRR: SVD_k of S W kept, the rest quantized, S E fitted with what is left of the rank."""
    root = symmetric_root(array(seen.hessian))
    k = srr_rank(weight, root, RANK, seed=0)
    U1, S1, Vh1 = triplets(root @ weight.T, k)
    A1, B1 = np.linalg.solve(root, U1).T, (np.diag(S1) @ Vh1).T
    quantized = min_max(weight - B1 @ A1, bits)
    U2, S2, Vh2 = triplets(root @ (weight - B1 @ A1 - quantized).T, RANK - k)
    A2, B2 = np.linalg.solve(root, U2).T, (np.diag(S2) @ Vh2).T
    return quantized, np.hstack([B1, B2]), np.vstack([A1, A2])


def lq_lora(weight: np.ndarray, seen: Statistics, bits: int) -> Answer:
    """LQ-LoRA: Fisher-weighted SVD with row and column means, then Q, until the weighted error rises."""
    root = np.sqrt(array(seen.fisher))
    row, column = root.mean(1, keepdims=True), root.mean(0, keepdims=True)
    quantized, last = np.zeros_like(weight), np.inf
    for _ in range(100):
        U, S, Vh = triplets(row * (weight - quantized) * column, RANK)
        B, A = U * np.sqrt(S) / row, np.sqrt(S)[:, None] * Vh / column
        quantized = normal_float(weight - B @ A, bits)
        error = np.linalg.norm(root * (weight - quantized - B @ A))
        if error > last:
            break
        last = error
    return quantized, B, A


PAPERS = {"lqer": lqer, "qera": qera, "eora": eora, "cloq": cloq, "srr": srr, "lq-lora": lq_lora}
