"""The published methods that look at calibration data: one matrix in, quantized matrix and low-rank factors out.

Written from the papers and their released code, on this package's grids. Every choice is an axis of the method's row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from qinit.errors import QinitError
from qinit.grids import Quantized
from qinit.linalg.hessian import activation_norm
from qinit.linalg.low_rank import LowRank
from qinit.linalg.weighting import Weighting
from qinit.solver.magr import reduce_magnitude
from qinit.solver.residual import as_loaded
from qinit.solver.spec import LayerSpec, Solution
from qinit.solver.statistics import Statistics

LEAST_MAGNITUDE = 1e-4  # LQER's lower bound of a channel's mean |x|

Norm = Callable[[torch.Tensor], float]


def solve_published(weight: torch.Tensor, spec: LayerSpec, statistics: Statistics, seed: int = 0) -> Solution:
    """Split `weight` W [out, in] (float32) into Q and B A as the method's paper does, by the axes of its row.

    metric     the norm that B A is fitted in, see `weighting_of`
    rounding   "nearest", or "gptq": with error feedback under the Hessian
    preserve   a part of the rank goes to W before the rest of it is quantized, see `preserved_rank`
    magr       W's magnitudes are reduced before rounding, see `qinit.solver.magr`
    start      "quantize": Q, then B A for W - Q. "low-rank": alternation, B A for W - Q and then Q for W - B A, with
               Q = 0 at first, until the error rises; what is returned is the round after which it stopped, as the
               released code does (LQ-LoRA, arXiv:2311.12023), or the best one with keep_best.

    Errors are relative to W's norm: sqrt(tr(E H E')) for the metrics "activation" and "diagonal", |sqrt(F) o E| for
    "fisher", Frobenius for "weight". `seed` draws the probe of `preserved_rank`.
    Raises QinitError if the method needs the Fisher information and `statistics` has none.
    """
    weighting, norm = weighting_of(spec, statistics), _norm_of(spec, statistics)
    if spec.method.start == "low-rank":
        quantized, low_rank, errors = _alternate(weight, spec, statistics, weighting, norm)
    else:
        quantized, low_rank, errors = _quantize_first(weight, spec, statistics, weighting, norm, seed)
    whole = norm(weight)
    scale = 1 / whole if whole else 0.0
    residual = weight.double() - as_loaded(quantized, spec).double()
    return Solution(
        quantized,
        low_rank,
        error=norm(residual - _product(low_rank)) * scale,
        quantized_error=norm(residual) * scale,
        trace=tuple(error * scale for error in errors),
    )


def weighting_of(spec: LayerSpec, statistics: Statistics) -> Weighting:
    """Return the norm that the method fits its low rank in.

    diagonal    column j by s_j / sqrt(min s * max s), s_j = max(E|x_j|, 1e-4): LQER (arXiv:2402.02446, section 3)
                as its released code, which takes the largest of the batches' means where this has the mean of all
    activation  H, plus the row's `ridge` times its mean diagonal: QERA-exact (arXiv:2410.06040, theorem 1), EoRA
                (arXiv:2410.21271) and, with a ridge of 0.01, CLoQ (arXiv:2501.18475, theorem 3.1)
    fisher      sqrt(F)'s row means times its column means: LQ-LoRA (arXiv:2311.12023, section 3.3; the means of the
                roots as in the paper, where its released code has the roots of the means)
    weight      nothing
    """
    match spec.method.metric:
        case "diagonal":
            magnitude = statistics.magnitude.clamp(min=LEAST_MAGNITUDE)
            return Weighting.diagonal(magnitude / (magnitude.min() * magnitude.max()).sqrt())
        case "activation":
            hessian = statistics.hessian
            if spec.method.ridge:
                hessian = hessian.to(torch.float64, copy=True)
                hessian.diagonal().add_(spec.method.ridge * hessian.diagonal().mean())
            return Weighting.of_inputs(hessian)
        case "fisher":
            root = _fisher_root(statistics)
            return Weighting.diagonal(root.mean(0), root.mean(1))
        case _:
            return Weighting.diagonal(torch.ones_like(statistics.magnitude))


def preserved_rank(weight: torch.Tensor, weighting: Weighting, rank: int, seed: int) -> int:
    """Return how much of `rank` SRR spends on `weight` before quantization: the k that minimises
    rho_k(S W) rho_{r-k}(S E), rho_p the energy that is left of a matrix after its p leading singular triplets.

    E [out, in] stands for the quantization error, drawn from U[-1, 1] with `seed`; its energy is taken to be a fixed
    share of what is quantized (SRR, arXiv:2602.02001). The smallest k among equals.
    """
    generator = torch.Generator().manual_seed(seed)
    probe = torch.rand(weight.shape, generator=generator).to(weight.device) * 2 - 1
    kept, noise = _energy_left(weighting.scale(weight), rank), _energy_left(weighting.scale(probe), rank)
    return int((kept * noise.flip(0)).argmin())


def _quantize_first(
    weight: torch.Tensor, spec: LayerSpec, statistics: Statistics, weighting: Weighting, norm: Norm, seed: int
) -> tuple[Quantized, LowRank, list[float]]:
    method, rest, preserved = spec.method, weight, None
    kept = preserved_rank(weight, weighting, spec.rank, seed) if method.preserve else 0
    if kept:
        preserved = weighting.fit(weight, kept, method.split)
        rest = weight - preserved.B @ preserved.A
    target = reduce_magnitude(rest, statistics.hessian, spec.group_size) if method.magr else rest
    quantized = _round(target, spec, statistics)
    residual = rest - as_loaded(quantized, spec)
    low_rank = fitted = weighting.fit(residual, spec.rank - kept, method.split)
    if preserved is not None:
        low_rank = LowRank(torch.cat([preserved.B, fitted.B], dim=1), torch.cat([preserved.A, fitted.A]))
    return quantized, low_rank, [norm(residual.double() - _product(fitted))]


def _alternate(
    weight: torch.Tensor, spec: LayerSpec, statistics: Statistics, weighting: Weighting, norm: Norm
) -> tuple[Quantized, LowRank, list[float]]:
    best: tuple[float, Quantized, LowRank] | None = None
    residual, errors = weight, [float("inf")]
    for _ in range(spec.iterations):
        low_rank = weighting.fit(residual, spec.rank, spec.method.split)
        quantized = _round(weight - low_rank.B @ low_rank.A, spec, statistics)
        residual = weight - as_loaded(quantized, spec)
        errors.append(norm(residual.double() - _product(low_rank)))
        if best is None or not spec.method.keep_best or errors[-1] < best[0]:
            best = (errors[-1], quantized, low_rank)
        if errors[-1] >= errors[-2]:  # equal: nothing changes any more
            break
    assert best is not None
    return best[1], best[2], errors[1:]


def _round(target: torch.Tensor, spec: LayerSpec, statistics: Statistics) -> Quantized:
    bits, group_size, search = spec.bits, spec.group_size, spec.method.search
    grid = spec.grid
    if spec.method.rounding == "gptq":
        return grid.round_gptq(target, statistics.hessian, bits=bits, group_size=group_size, search=search)[0]
    return grid.quantize(target, target, bits=bits, group_size=group_size, search=search)[0]


def _norm_of(spec: LayerSpec, statistics: Statistics) -> Norm:
    if spec.method.metric == "fisher":
        root = _fisher_root(statistics)
        return lambda matrix: float((root * matrix.double()).norm())
    if spec.method.metric == "weight":
        return lambda matrix: float(matrix.double().norm())
    return lambda matrix: activation_norm(matrix, statistics.hessian)


def _fisher_root(statistics: Statistics) -> torch.Tensor:
    if statistics.fisher is None:
        raise QinitError(
            "the Fisher information is missing: calibrate with gradients to use a method that weighs by it"
        )
    return statistics.fisher.double().sqrt()


def _energy_left(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """Return, for p = 0 .. rank, the share of the squared singular values beyond the p largest; 0 for zeros."""
    energies = torch.linalg.svdvals(matrix).square()
    tails = torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(rank + 1)])[: rank + 1]
    return tails / tails[0] if tails[0] > 0 else tails


def _product(low_rank: LowRank) -> torch.Tensor:
    return low_rank.B.double() @ low_rank.A.double()
