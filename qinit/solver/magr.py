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

    `magnitudes` [..., group]; 0 where they add up to less. By Moreau it is x less its projection on an l1 ball, and t
    is found as there (Michelot 1986, J. Optim. Theory Appl. 50): from below, by what those above it add up to, until
    all of them stay above. It begins just below the largest, so that some three steps do; a sort takes longer.
    """
    largest = magnitudes.amax(-1, keepdim=True)
    below = magnitudes - largest  # and t too: small differences of large sums would be rounded away
    limit = torch.full_like(largest, -strength)
    while True:
        above = below >= limit
        higher = (torch.where(above, below, 0.0).sum(-1, keepdim=True) - strength) / above.sum(-1, keepdim=True)
        if not bool((higher > limit).any()):
            return (largest + limit).squeeze(-1).clamp(min=0)
        limit = torch.maximum(limit, higher)
