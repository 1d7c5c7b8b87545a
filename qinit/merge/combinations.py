"""How the adapters of one matrix become one, by the functions behind PEFT's `add_weighted_adapter`.

The method itself works on a loaded model, and it takes all that adapters hold. Adapters that were trained from one
start all hold that start, so that `linear` would give it (sum of sqrt(w))^2 times: 1.9 times for 0.7 and 0.3, twice for
two halves. With a start, what is combined is therefore what training added to each factor, A - A0 and B - B0, as task
vectors are defined (arXiv:2212.04089; TIES: arXiv:2306.01708; DARE: arXiv:2311.03099), and the start is added once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qinit.linalg.low_rank import LowRank, truncated

# Each with the function of peft.utils.merge_utils; svd has none.
COMBINATIONS = {
    "linear": "task_arithmetic",
    "svd": None,
    "ties": "ties",
    "dare_ties": "dare_ties",
    "dare_linear": "dare_linear",
    "magnitude_prune": "magnitude_prune",
}
PRUNING = ("ties", "dare_ties", "dare_linear", "magnitude_prune")  # they keep a share of the values, the density


@dataclass(frozen=True)
class Factors:
    """What PEFT keeps of a matrix's adapter: it adds `scale` B A, with B [out, r] and A [r, in], float32."""

    A: torch.Tensor
    B: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return len(self.A)


def combined(
    how: str,
    adapters: Sequence[Factors],
    weights: Sequence[float],
    start: Factors | None,
    density: float | None,
    seed: int,
) -> Factors:
    """Return the adapter that adapters of one matrix [out, in] come to, each with a weight.

    `how` is one of COMBINATIONS. With a `start`, which has their ranks and scale, as has the result: each factor is the
    start's plus the combination of what training added to it, whatever the weights add up to. With None it is what
    `add_weighted_adapter` gives: weights w s, their roots on either factor, and a result of scale 1. `svd` is the best
    approximation of the weighted sum, and the start once, at the largest rank of all. `density` is the share of values
    that PRUNING combinations keep; what DARE drops follows from `seed`.
    """
    function = COMBINATIONS[how]
    if function is None:
        return _best(adapters, weights, start)
    from peft.utils import merge_utils

    combine = getattr(merge_utils, function)
    options = {} if density is None else {"density": density}
    if start is None:
        shares = [weight * each.scale for weight, each in zip(weights, adapters, strict=True)]
        roots = [math.sqrt(abs(share)) for share in shares]
        signed = [math.copysign(root, share) for root, share in zip(roots, shares, strict=True)]
        nothing = torch.zeros(())
        start, on_a, on_b = Factors(nothing, nothing, 1.0), signed, roots
    else:
        on_a = on_b = list(weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        A = combine([each.A - start.A for each in adapters], torch.tensor(on_a), **options)
        B = combine([each.B - start.B for each in adapters], torch.tensor(on_b), **options)
    return Factors(start.A + A, start.B + B, start.scale)


def _best(adapters: Sequence[Factors], weights: Sequence[float], start: Factors | None) -> Factors:
    """S + sum of w (L - S) is sum of w L + (1 - sum of w) S: one product of long factors, truncated."""
    parts = list(zip(adapters, weights, strict=True))
    if start is not None:
        parts.append((start, 1 - sum(weights)))
    B = torch.cat([weight * each.scale * each.B for each, weight in parts], dim=1)
    A = torch.cat([each.A for each, _ in parts])
    scale, rank = (1.0, max(each.rank for each in adapters)) if start is None else (start.scale, start.rank)
    found = truncated(LowRank(B, A), rank)
    return Factors(found.A / math.sqrt(scale), found.B / math.sqrt(scale), scale)
