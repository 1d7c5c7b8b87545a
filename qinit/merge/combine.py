"""Several adapters of one base become one adapter: what each has learned, and the start that all have once.

One matrix at a time is in memory, and no weight of the base: its headers say whether the adapters are for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qinit.adapters import CONFIG_NAME, WEIGHTS_STEM, LoraAdapter, write_config
from qinit.adapters.changes import LowRankAdded
from qinit.adapters.reading import kind_of
from qinit.adapters.trained import WEIGHTS_NAME
from qinit.errors import CheckpointError, RecipeError, did_you_mean
from qinit.files.manifest import file_sum
from qinit.files.tensors import TensorSpec, read_header
from qinit.files.writer import SafetensorsWriter
from qinit.linalg.low_rank import LowRank
from qinit.machine import versions
from qinit.merge.combinations import COMBINATIONS, PRUNING, Factors, combined
from qinit.merge.origin import Origin, origin_of
from qinit.report.combined import Combined, Part, write_combined_card
from qinit.solver.spec import seed_of
from qinit.source.checkpoint import Checkpoint, read_finite
from qinit.source.targets import Architecture, read_architecture
from qinit.stock.skeleton import Skeleton
from qinit.trial.fitting import BASE_KEY, open_adapter, require_names
from qinit.workplace.place import check_free, require_space, working_on

DENSITY = 0.5
Pairs = dict[str, LowRankAdded]  # by the parameter that they are added to


@dataclass(frozen=True)
class CombinePlan:
    """What becomes one: `adapters` with their weights and factors, and those of the start they were trained from."""

    origin: Origin
    adapters: tuple[Path, ...]
    weights: tuple[float, ...]
    how: str
    density: float | None
    pairs: tuple[Pairs, ...]
    start: Pairs | None
    config: dict[str, Any]

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of the result for each parameter."""
        return _ranks((*self.pairs, *([self.start] if self.start else [])))

    @property
    def specs(self) -> list[TensorSpec]:
        found = []
        for pair, rank in zip(self.pairs[0].values(), self.ranks.values(), strict=True):
            found.append(TensorSpec(pair.A.name, torch.float32, (rank, pair.A.shape[1])))
            found.append(TensorSpec(pair.B.name, torch.float32, (pair.B.shape[0], rank)))
        return found


def plan_combine(
    adapters: Sequence[Path],
    weights: Sequence[float],
    how: str = "linear",
    density: float | None = None,
    *,
    run: Path | None = None,
    trust_remote_code: bool = False,
) -> CombinePlan:
    """Plan what adapters become together, each with its weight; no weight of the base is read.

    `run` is the run that they were trained on, or the adapter that qinit made for their base; None: the base that they
    name. `density` is the share of values that a pruning combination keeps, DENSITY unless told.

    Raises RecipeError for weights, a combination or a density that do not fit, CheckpointError for what is no LoRA
    adapter of factors alone, for adapters of different bases, modules or ranks and for one that has others than the
    start, and ReportError for what is no run.
    """
    _require_options(adapters, weights, how, density)
    if density is None and how in PRUNING:
        density = DENSITY
    settings = {adapter: open_adapter(adapter, "--adapters") for adapter in adapters}
    for adapter in adapters:
        _require_lora(adapter, settings[adapter])
    origin = origin_of(settings, run)
    checkpoint = Checkpoint.open(origin.base, quantized=True)
    architecture = read_architecture(checkpoint, trust_remote_code)
    skeleton = Skeleton.of(checkpoint, trust_remote_code)
    pairs = [_pairs(adapter, settings[adapter], architecture) for adapter in adapters]
    for adapter in adapters:
        require_names(adapter, settings[adapter], read_header(adapter / WEIGHTS_NAME), skeleton)
    for adapter, found in zip(adapters[1:], pairs[1:], strict=True):
        _require_same(adapter, found, adapters[0], pairs[0], ranks=origin.start is None and how != "svd")
    start, config = None, _plain_config(settings[adapters[0]], _ranks(pairs))
    if origin.start is not None:
        config = open_adapter(origin.start)
        start = _pairs(origin.start, config, architecture)
        for adapter, found in zip(adapters, pairs, strict=True):
            _require_same(adapter, found, origin.start, start, ranks=True, scales=True)
    return CombinePlan(
        origin, tuple(adapters), tuple(weights), how, density, tuple(pairs), start, {**config, BASE_KEY: origin.name}
    )


def combine(plan: CombinePlan, out: Path, *, command: str = "") -> Combined:
    """Write the adapter at `out`, as PEFT loads it on the base; nothing is there before it is whole.

    Raises OutputError for a place that is taken, too small or cannot be written to, and CheckpointError for a tensor
    with NaN or Inf, and for an adapter that holds less than half of the start that it is said to come from.
    """
    nbytes = sum(spec.nbytes for spec in plan.specs)
    sources = [plan.origin.base, *plan.adapters, *([plan.origin.start] if plan.origin.start else [])]
    check_free(out, *sources)
    require_space(nbytes, out)
    with working_on(out, command, lambda: nbytes) as place:
        check_free(out)
        place.clear()
        place.run.mkdir()
        writer = SafetensorsWriter(place.run, plan.specs, WEIGHTS_STEM)
        sizes = _Sizes(plan)
        for name, first in plan.pairs[0].items():
            adapters = [_read(pairs[name]) for pairs in plan.pairs]
            start = None if plan.start is None else _read(plan.start[name])
            found = combined(plan.how, adapters, plan.weights, start, plan.density, seed_of(name, 0))
            sizes.add(adapters, start)
            writer.write(first.A.name, found.A)
            writer.write(first.B.name, found.B)
        sizes.require_begun_there()
        writer.close()
        write_config(place.run, plan.config)
        report = _report(plan, sizes, nbytes, command)
        write_combined_card(place.run, report)
        place.finish()
    return report


def _require_options(adapters: Sequence[Path], weights: Sequence[float], how: str, density: float | None) -> None:
    if how not in COMBINATIONS:
        known = ", ".join(COMBINATIONS)
        raise RecipeError(f"--combination: no '{how}'{did_you_mean(how, COMBINATIONS)}; known are {known}")
    if len(adapters) < 2:
        raise RecipeError(f"--adapters: expected two or more, as A,B; found {len(adapters)}")
    if len(weights) != len(adapters) or not all(map(math.isfinite, weights)):
        shown = ",".join(f"{weight:g}" for weight in weights) or "none"
        raise RecipeError(f"--weights: expected {len(adapters)} numbers, one for each of --adapters; found {shown}")
    if density is not None and how not in PRUNING:
        raise RecipeError(f"--density: is about {', '.join(PRUNING)}; {how} keeps all values")
    if density is not None and not 0 < density < 1:
        raise RecipeError(f"--density: expected a share above 0 and below 1, found {density:g}")


def _require_lora(adapter: Path, settings: dict[str, Any]) -> None:
    kind = settings.get("peft_type")
    if kind != LoraAdapter.peft_type:
        raise CheckpointError(f"{adapter / CONFIG_NAME}: peft_type is {kind!r}; adapters of type LORA are combined")


def _pairs(adapter: Path, settings: dict[str, Any], architecture: Architecture) -> Pairs:
    """Return the factors of each parameter. Raises CheckpointError where there is more than these."""
    found: Pairs = {}
    tensors = read_header(adapter / WEIGHTS_NAME)
    for name, changes in kind_of(adapter, settings).changes(adapter, settings, tensors, architecture).items():
        (change, *others) = changes
        if others or not isinstance(change, LowRankAdded) or change.magnitude is not None or "[" in name:
            what = "experts' factors are stacked" if "[" in name else "; ".join(each.words for each in changes)
            raise CheckpointError(
                f"{adapter}: {name}: {what}; combined are factors of single matrices alone (no DoRA, biases, "
                "modules_to_save, rows or experts)"
            )
        found[name] = change
    return found


def _require_same(
    adapter: Path, found: Pairs, other: Path, expected: Pairs, *, ranks: bool, scales: bool = False
) -> None:
    """Raise CheckpointError where two adapters have different modules, or different ranks or scales where these count;
    `scales` only count beside a start."""
    what = f"{other}, which it was to be trained from" if scales else f"{other}"
    if differing := sorted(found.keys() ^ expected.keys()):
        has, lacks = (adapter, other) if differing[0] in found else (other, adapter)
        raise CheckpointError(
            f"{adapter}: its modules are not those of {what}: {differing[0]} is in {has} and not in {lacks} "
            f"({len(differing)} such); adapters of the same modules are combined"
        )
    for name, pair in found.items():
        here, there = pair.A.shape[0], expected[name].A.shape[0]
        if ranks and here != there:
            advice = "" if scales else "; --combination svd takes different ranks"
            raise CheckpointError(f"{adapter}: {name} has rank {here}, and rank {there} in {what}{advice}")
        if scales and not math.isclose(pair.scale, expected[name].scale, rel_tol=1e-6):
            raise CheckpointError(
                f"{adapter}: {name} has scale {pair.scale:g}, and {expected[name].scale:g} in {what}; is its "
                "lora_alpha another?"
            )


def _ranks(all_pairs: Sequence[Pairs]) -> dict[str, int]:
    return {name: max(pairs[name].A.shape[0] for pairs in all_pairs) for name in all_pairs[0]}


def _plain_config(settings: dict[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the configuration of adapters without a start, each at its rank and with a scale of 1."""
    most = max(ranks.values())
    others = {name.removesuffix(".weight"): rank for name, rank in ranks.items() if rank != most}
    same = {"r": most, "lora_alpha": most, "rank_pattern": others, "alpha_pattern": others}
    return {**settings, **same, "use_rslora": False}


def _read(pair: LowRankAdded) -> Factors:
    return Factors(read_finite(pair.A).float(), read_finite(pair.B).float(), pair.scale)


class _Sizes:
    """How large the start is and what training has added to it, over all matrices, and whether the start is still
    there: each factor, projected on the start's, where training moves in all directions but hardly undoes it."""

    def __init__(self, plan: CombinePlan) -> None:
        self.plan = plan
        self.of_start = 0.0
        self.added = [0.0] * len(plan.adapters)
        self._kept = [[0.0, 0.0] for _ in plan.adapters]
        self._whole = [0.0, 0.0]

    def add(self, adapters: Sequence[Factors], start: Factors | None) -> None:
        if start is not None:
            self.of_start += _square([(start, 1.0)])
            self._whole = [w + float((f * f).sum()) for w, f in zip(self._whole, (start.A, start.B), strict=True)]
        for at, each in enumerate(adapters):
            self.added[at] += _square([(each, 1.0)] if start is None else [(each, 1.0), (start, -1.0)])
            if start is not None:
                both = ((each.A, start.A), (each.B, start.B))
                self._kept[at] = [k + float((f * s).sum()) for k, (f, s) in zip(self._kept[at], both, strict=True)]

    def require_begun_there(self) -> None:
        """Raise CheckpointError for an adapter that has too little of the start to have begun with it."""
        for adapter, kept in zip(self.plan.adapters, self._kept, strict=True):
            if any(part < 0.5 * whole for part, whole in zip(kept, self._whole, strict=True)):
                raise CheckpointError(
                    f"{adapter}: does not hold what is in {self.plan.origin.start}, so it was trained from another "
                    "start; give what qinit made for that one, or combine them by PEFT's add_weighted_adapter"
                )


def _square(parts: Sequence[tuple[Factors, float]]) -> float:
    """Return the squared Frobenius norm of a sum of s B A, from the factors alone."""
    B = torch.cat([share * each.scale * each.B.double() for each, share in parts], dim=1)
    product = LowRank(B, torch.cat([each.A.double() for each, _ in parts]))
    return float(((product.B.T @ product.B) * (product.A @ product.A.T)).sum().clamp(min=0))


def _report(plan: CombinePlan, sizes: _Sizes, nbytes: int, command: str) -> Combined:
    whole = math.sqrt(sizes.of_start)
    parts = tuple(
        Part(str(adapter), file_sum(adapter / WEIGHTS_NAME), weight, math.sqrt(added))
        for adapter, weight, added in zip(plan.adapters, plan.weights, sizes.added, strict=True)
    )
    start = None if plan.origin.start is None else file_sum(plan.origin.start / WEIGHTS_NAME)
    return Combined(
        plan.origin.name,
        plan.how,
        plan.density,
        parts,
        start,
        whole,
        len(plan.pairs[0]),
        max(plan.ranks.values()),
        nbytes,
        plan.origin.notes,
        versions(),
        command,
    )
