"""What the solver may know of a layer's inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qinit.linalg.low_rank import OutputMetric


@dataclass(frozen=True)
class Statistics:
    """Second moments of one linear layer's inputs x, float32; `tokens` is how many were seen.

    hessian [in, in]: E[x x'], x as the repaired model in front of the layer delivers it.
    magnitude [in]: E|x|.
    mean [in]: E[x].
    shared: how many tokens of other layers of its kind are in both, beside its own.
    drift [out, in]: E[d x'], with d the difference at the layer's output between the original model and the
    repaired one if this layer kept its weight: what is still to be made good. None: nothing upstream has changed.
    fisher [out, in]: mean squared gradient of the loss, where the method asks for it.
    own: the drift is for one solve alone, which may put something else in its place; on a CPU, as on another device a
    solve that has no room is tried again.
    output_metric: the metric of errors at the layer's output, where the method asks for it. None: all count alike.
    """

    hessian: torch.Tensor
    magnitude: torch.Tensor
    tokens: int
    drift: torch.Tensor | None = None
    fisher: torch.Tensor | None = None
    output_metric: OutputMetric | None = None
    shared: int = 0
    mean: torch.Tensor | None = None
    own: bool = False
