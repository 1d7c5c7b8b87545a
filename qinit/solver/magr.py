"""Weight magnitude reduction: shrink a group's largest weights in directions that the inputs hardly see."""

from __future__ import annotations

import torch

from qinit.linalg.chunks import grouped

STRENGTH = 1e-4  # the released code's for groups; in the weight's own units
STEPS = 200


def reduce_magnitude(
    weight: torch.Tensor, hessian: torch.Tensor, group_size: int, strength: float = STRENGTH, steps: int = STEPS
) -> torch.Tensor:
    """Return the W' [out, in] that is near the minimum of tr((W' - W) H (W' - W)') / 2 + strength * sum |W'_g|_inf.

    `weight` W [out, in] and `hessian` H [in, in] float32, H divided by its largest eigenvalue first; the sum runs over
    every row's groups of `group_size` inputs. Proximal gradient steps of length 1, from W (MagR, Zhang et al. 2024,
    arXiv:2406.00800, algorithm 1; released code, per group). Its H is that of the last calibration sample, here of all.
    """
    largest = float(torch.linalg.eigvalsh(hessian.double())[-1])
    if largest <= 0:
        return weight.clone()
    scaled = hessian / largest
    result = weight
    for _ in range(steps):
        moved = result - (result - weight) @ scaled
        groups = grouped(moved, group_size)
        limit = _prox_limit(groups.abs(), strength)[..., None]
        result = torch.minimum(torch.maximum(groups, -limit), limit).flatten(1)[:, : weight.shape[1]]
    return result.contiguous()


def _prox_limit(magnitudes: torch.Tensor, strength: float) -> torch.Tensor:
    """The proximal operator of strength * |x|_inf clips x at this: the t >= 0 with sum_i max(|x_i| - t, 0) = strength.

    By Moreau it is x less its projection on an l1 ball (Duchi et al. 2008); t is the largest of
    (the k largest |x_i| added up - strength) / k. `magnitudes` [..., group]; 0 where they add up to less.
    """
    sums = magnitudes.sort(dim=-1, descending=True).values.cumsum(-1)
    counts = torch.arange(1, magnitudes.shape[-1] + 1, device=magnitudes.device)
    return ((sums - strength) / counts).amax(-1).clamp(min=0)
