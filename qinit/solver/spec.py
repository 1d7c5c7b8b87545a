"""What the solver is asked for one matrix, and what it answers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from qinit.grids import GRIDS, GivenGrid, Grid, Quantized
from qinit.linalg.low_rank import LowRank
from qinit.processes.group import ALONE, Processes
from qinit.solver.methods import Method


@dataclass(frozen=True)
class Gradient:
    """The leading singular triplets of the loss's mean gradient with respect to a weight [out, in], float32: U [out,
    k], S [k], Vh [k, in]."""

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor


@dataclass(frozen=True)
class LayerSpec:
    """What to do with one matrix. `storage` is the dtype that Q will be rounded to when it is stored
    unpacked (None: stored as codes, nothing is lost). `given` is Q itself [out, in], float32, where a base that exists
    has it. Of starts alone: `scale` is s of Q + s B A, `niter` how many power iterations take the place of a full
    decomposition, `gradient` that of the weight. `processes`: those that solve this one matrix together, if its method
    can be carried out row by row."""

    method: Method
    bits: int
    group_size: int
    rank: int
    iterations: int
    storage: torch.dtype | None = None
    given: torch.Tensor | None = None
    scale: float = 1.0
    niter: int | None = None
    gradient: Gradient | None = None
    processes: Processes = ALONE

    @property
    def grid(self) -> Grid:
        """The grid that Q is searched on."""
        return GRIDS[self.method.grid] if self.given is None else GivenGrid(self.given)


@dataclass(frozen=True)
class Solution:
    """W ~ Q + L: Q [out, in] as codes, L = B A unscaled. Errors are Frobenius norms relative to W's;
    `trace` has one per iteration, `quantized_error` is that of Q alone. With calibration, output errors are the root
    mean squares of (W - Q - L) x and (W - Q) x relative to W x, and `trace` is in the method's own metric."""

    quantized: Quantized
    low_rank: LowRank | None
    error: float
    quantized_error: float
    trace: tuple[float, ...]
    output_error: float | None = None
    quantized_output_error: float | None = None


def seed_of(name: str, seed: int) -> int:
    """A layer's own seed, from its name: the order of the jobs does not change any byte."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1
