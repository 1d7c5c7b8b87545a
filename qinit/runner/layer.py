"""One layer: its weight read, solved, and what comes of it as tensors and as a row of the report."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from qinit.clock import counted
from qinit.formats import FORMATS
from qinit.plan.parts import LayerPlan
from qinit.plan.plan import Plan
from qinit.processes.group import ALONE, Processes
from qinit.report.report import LayerRow
from qinit.solver.residual import as_loaded
from qinit.solver.solve import solve
from qinit.solver.spec import Gradient, seed_of
from qinit.solver.statistics import Statistics
from qinit.source.checkpoint import not_decomposable, read_finite


@counted("reading")
def read_weight(layer: LayerPlan, device: torch.device) -> torch.Tensor:
    """Return W [out, in] in float32 on the device. Raises CheckpointError for NaN and Inf."""
    target = layer.target
    parts = [read_finite(tensor, device) for tensor in target.tensors]
    raw = parts[0] if len(parts) == 1 else torch.cat(parts, dim=target.outputs_side)
    return (raw.T if target.module.transposed else raw).to(torch.float32).contiguous()


@counted("solving")
def solve_layer(
    plan: Plan,
    layer: LayerPlan,
    weight: torch.Tensor | None,
    statistics: Statistics | None,
    given: torch.Tensor | None = None,
    gradient: Gradient | None = None,
    processes: Processes = ALONE,
) -> tuple[dict[str, torch.Tensor], LayerRow]:
    """Solve a layer from its weight W [out, in], float32, and what it has seen (None: nothing); return its tensors, of
    base and adapter by name, on the CPU, and its row. Without a weight the layer is kept, and only gets an adapter.
    With `given`, Q [out, in] of a base that is there, or of a layer that is kept, no tensors of a base are made. The
    `gradient` is that of the weight, for a method that needs it. Several `processes` call it all for the same layer,
    and share its rows.

    It depends on its arguments alone and changes nothing, so it can be carried out by another process.
    Raises CheckpointError for a weight that cannot be decomposed.
    """
    started = time.perf_counter()
    target, recipe = layer.target, plan.recipe
    seed = seed_of(target.name, recipe.seed)
    solution, tensors = None, {}
    if weight is not None:
        without_data = recipe.calibrated and statistics is None and gradient is None
        spec = plan.data_free_spec(layer) if without_data else plan.layer_spec(layer)
        spec = replace(spec, given=given, gradient=gradient, processes=processes)
        try:
            solution = solve(weight, spec, seed, statistics)
        except torch.linalg.LinAlgError as error:
            raise not_decomposable(target.tensor, weight) from error
        if given is None:
            encoded = FORMATS[recipe.format].encode(target, solution.quantized, spec.grid)
            tensors = {name: tensor.cpu() for name, tensor in encoded.items()}
    low_rank = solution.low_rank if solution else None
    if given is not None and recipe.row.refit and low_rank is not None and not low_rank.B.any():
        low_rank = None  # nothing to repair: factors that are both zero would not be trained
    if layer.rank:
        base = given
        if plan.adapter.reads_base and solution is not None:
            base = as_loaded(solution.quantized, spec)
        tensors |= plan.adapter.encode(target.module, low_rank, layer.rank, recipe.lora_scale, seed, base)
    row = LayerRow(
        name=target.name,
        shape=(target.module.out_features, target.module.in_features),
        bits=layer.bits if solution else None,
        group_size=layer.group_size if solution else None,
        rank=layer.rank,
        bytes_before=target.nbytes,
        bytes_after=layer.bytes_after,
        error_start=solution.quantized_error if solution else None,
        error=solution.error if solution else None,
        trace=solution.trace if solution else (),
        seconds=round(time.perf_counter() - started, 4),
        kept=layer.kept,
        output_error_start=solution.quantized_output_error if solution else None,
        output_error=solution.output_error if solution else None,
        tokens=statistics.tokens if statistics is not None else None,
    )
    return tensors, row
