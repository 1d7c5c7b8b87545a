"""What is tried of a run, in the process that may be broken by it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qinit.errors import CheckpointError
from qinit.formats import format_of
from qinit.loading import load_base
from qinit.source.checkpoint import Checkpoint, read_json
from qinit.source.targets import read_architecture
from qinit.stream.calls import NotStreamable
from qinit.stream.weights import ModelWeights
from qinit.trial.asked import Answer, Asked
from qinit.trial.deep import compare_blocks
from qinit.trial.names import LoadingInfo, lost_factors, lost_names, on_meta, put_on, shown, silent
from qinit.trial.passes import Reached, distance, first_run, learn, outputs_of
from qinit.trial.twin import build_twin, trained_whole, weights_of

CLOSE = 1e-4  # relative, in float32: models of all kinds are at 1e-6, and a repair that is missed begins at 1e-3
ROUNDED = 5e-2  # where the layers compute, or are unpacked, in 16 bits


@dataclass(frozen=True)
class Trial:
    """What was asked for, with its paths."""

    asked: Asked

    @property
    def run(self) -> Path:
        return Path(self.asked.run)

    @property
    def adapter(self) -> Path:
        return Path(self.asked.adapter)

    @property
    def source(self) -> Path | None:
        return Path(self.asked.source) if self.asked.source is not None else None


def tried(asked: Asked) -> Iterator[Answer]:
    """Try it and yield what is found, and at the end what was done. Raises CheckpointError for what cannot be
    loaded."""
    trial = Trial(asked)
    if asked.how == "names":
        problems = lost_names(
            trial.run, trial.adapter, trial.source, asked.class_name, trust_remote_code=asked.trust_remote_code
        )
        yield from (Answer("base", problem) for problem in problems)
        yield Answer("base", "names as stock transformers and PEFT look for them", kind="done")
        return
    without = asked.how in ("meta", "blocks")
    model, info = _loaded(trial, meta=without)
    class_name = type(model).__name__
    yield from _keys(trial, model, info)
    adapted, said = put_on(model, trial.adapter, meta=without)
    problems = [*said, *lost_factors(adapted, trial.adapter)]
    yield from (Answer("adapter", f"on {class_name}: {problem}") for problem in problems)
    if asked.how == "blocks" and not problems:
        yield from _blocks(trial, adapted.eval(), class_name)
    elif without:
        yield Answer("base", f"loaded by {class_name} and PEFT without weights", kind="done")
    if without:
        return
    yield from _passes(trial, adapted.eval(), class_name)


def _loaded(trial: Trial, *, meta: bool) -> tuple[Any, LoadingInfo]:
    asked = trial.asked
    config = read_json(trial.run / "config.json", "the directory is incomplete; run qinit again")
    with silent():
        model, info = load_base(
            trial.run,
            asked.class_name,
            config,
            dtype=torch.float32,
            device="meta" if meta else None,
            trust_remote_code=asked.trust_remote_code,
        )
    return model, LoadingInfo.of(info)


def _keys(trial: Trial, model: Any, info: LoadingInfo) -> Iterator[Answer]:
    """Judge what transformers says of the base's keys: against the source's, where that is known, else by what of it
    is not qinit's doing, as every tensor of the source is among the run's."""
    if not info:
        return
    asked, class_name = trial.asked, type(model).__name__
    if (theirs := _source_info(trial)) is not None:
        yield from (Answer("base", problem) for problem in info.beyond(theirs).problems(class_name))
        return
    checkpoint = Checkpoint.open(trial.run, quantized=True)
    weights = ModelWeights(checkpoint, read_architecture(checkpoint, asked.trust_remote_code))
    parts = () if (fmt := format_of(checkpoint.config)) is None else fmt.parts
    linear = {f"{name.removesuffix('weight')}{part}" for name in weights.modules for part in ("weight", *parts)}
    ours = LoadingInfo(
        frozenset(name for name in info.missing if name in linear or weights.has(name)),
        frozenset(name for name in info.unexpected if name.rpartition(".")[2] in parts),
        info.mismatched,
    )
    yield from (Answer("base", problem) for problem in ours.problems(class_name))
    for problem in info.beyond(ours).problems(class_name):
        yield Answer("base", f"{problem}; so it was in the source, as far as can be seen (--source compares)", False)


def _blocks(trial: Trial, adapted: Any, class_name: str) -> Iterator[Answer]:
    """Compare a model that was loaded without weights with what its files say, block by block."""
    farthest, count = 0.0, 0
    try:
        weights = weights_of(trial.run, trial.adapter, trust_remote_code=trial.asked.trust_remote_code)
        for block in compare_blocks(adapted, weights, trial.adapter, trial.run):
            count, farthest = count + 1, max(farthest, block.apart)
            yield from (Answer("adapter", f"{block.path}: {what}", grave) for grave, what in block.learned)
            if not block.apart <= CLOSE:
                what = f"what {block.path} of {class_name} and PEFT gives is {block.apart:.1e} (relative) from"
                yield Answer("base", f"{what} Q + s B A of the files")
    except (CheckpointError, NotStreamable) as error:
        yield Answer("base", f"{class_name} was not compared block by block: {error}", False)
    done = f"loaded by {class_name} and PEFT without weights"
    if count:
        done += f"; {count} blocks, filled from the files, are {farthest:.0e} from Q + s B A and have gradients; "
        done += "how the loaders read values, and what lies outside the blocks, was not compared"
    yield Answer("base", done, kind="done")


def _source_info(trial: Trial) -> LoadingInfo | None:
    """Return what transformers says of the source, None where that is not known or cannot be loaded any more."""
    if trial.source is None:
        return None
    try:
        return on_meta(trial.source, trial.asked.class_name, trust_remote_code=trial.asked.trust_remote_code)[1]
    except CheckpointError:
        return None


def _passes(trial: Trial, adapted: Any, class_name: str) -> Iterator[Answer]:
    """Run the loaded model forward and back, then the model that the files describe, and compare."""
    reached = Reached(adapted)
    found = first_run(adapted, trial.run)
    reached.close()
    count = len(reached.names)
    if not isinstance(found, str):
        inputs, outputs = found
        if not all(bool(torch.isfinite(each).all()) for each in outputs):
            yield Answer("base", f"{class_name} gives NaN or Inf on random {' and '.join(inputs)}")
        yield from (Answer("adapter", what, grave) for grave, what in learn(outputs, adapted, reached))
        found = inputs, [each.detach() for each in outputs]
    try:
        weights = weights_of(trial.run, trial.adapter, trust_remote_code=trial.asked.trust_remote_code)
    except CheckpointError as error:
        yield Answer("base", f"what {class_name} predicts was not compared: {error}", False)
        yield Answer("base", f"loaded by {class_name} and PEFT, gradients at {count} adapted modules", kind="done")
        return
    unknown = _unknown(adapted, weights)
    del adapted, reached  # one of the two models is in memory at a time
    if unknown:
        what = f"taken as {class_name} has it, as qinit does not read it: {shown(unknown)}"
        yield Answer("base", what, False)
    with torch.no_grad():
        others = {**unknown, **trained_whole(trial.adapter)}
        yield from _compared(trial, class_name, build_twin(weights, others), found, count)


def _unknown(adapted: Any, weights: ModelWeights) -> dict[str, torch.Tensor]:
    """Return the parameters that the files hold under no name that qinit knows, if at all: fused experts, new heads."""
    found: dict[str, Any] = {}
    for name, value in adapted.get_base_model().named_parameters(remove_duplicate=False):
        if not re.search(r"lora_|modules_to_save", name):
            found[re.sub(r"(\.(base_layer|original_module))+\.", ".", name)] = value
    known = {id(value) for name, value in found.items() if weights.has(name)}  # a tied head has no tensor of its own
    return {name: value.detach() for name, value in found.items() if id(value) not in known}


def _compared(
    trial: Trial,
    class_name: str,
    twin: Any,
    found: tuple[dict[str, torch.Tensor], list[torch.Tensor]] | str,
    count: int,
) -> Iterator[Answer]:
    done = f"loaded by {class_name} and PEFT"
    if isinstance(found, str):
        alone = first_run(twin, trial.run)
        if isinstance(alone, str):
            yield Answer("base", f"{class_name} was not run, as no inputs are known that it takes ({alone})", False)
        else:
            yield Answer("base", f"{class_name} runs on {' and '.join(alone[0])}, but not as it was loaded: {found}")
        yield Answer("base", done, kind="done")
        return
    inputs, outputs = found
    apart = distance(outputs, outputs_of(twin, inputs))
    fmt = format_of(read_json(trial.run / "config.json", ""))
    exact = fmt is None or fmt.exact
    if not apart <= (CLOSE if exact else ROUNDED):
        what = f"what {class_name} and PEFT predict is {apart:.1e} (relative) from Q + s B A of the files"
        yield Answer("base", what)
    done += f", predictions {apart:.0e} from Q + s B A of the files{'' if exact else ' (16 bits in its layers)'}"
    done += f", gradients at {count} adapted modules"
    yield Answer("base", done, kind="done")
