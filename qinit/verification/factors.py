"""The adapter: its configuration, the scale that follows from it, its tensors and the base that it names."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch

from qinit.adapters import ADAPTER_DIRECTORY, CONFIG_NAME, WEIGHTS_STEM
from qinit.errors import CheckpointError, ReportError
from qinit.files.manifest import refresh
from qinit.files.tensors import StoredTensor, TensorSpec, read_header
from qinit.report.report import REPORT_NAME, Report
from qinit.source.checkpoint import Checkpoint, read_json
from qinit.source.targets import LinearModule
from qinit.stock.settle import whole_parameters
from qinit.stock.skeleton import Skeleton
from qinit.verification.findings import Finding, from_error
from qinit.verification.written import Written, compare, differing

CONFIG_FILE = f"{ADAPTER_DIRECTORY}/{CONFIG_NAME}"
WEIGHTS_FILE = f"{ADAPTER_DIRECTORY}/{WEIGHTS_STEM}.safetensors"
BASE_KEY = "base_model_name_or_path"
FREE = (BASE_KEY, "inference_mode")  # the base has a check of its own; PeftModel.from_pretrained overrules the other


def check_adapter(written: Written) -> Generator[Finding, None, dict[str, StoredTensor]]:
    """Compare the adapter with what the report says was written; returns its tensors that are as they should be, by
    the names that layers have for them."""
    directory, rows = written.directory, written.report.layers
    ranks = [(written.modules[row.name], row.rank) for row in rows]
    try:
        config = read_json(directory / CONFIG_FILE, "the adapter is incomplete; run qinit again")
    except CheckpointError as error:
        yield from_error(directory, CONFIG_FILE, error)
    else:
        expected = written.adapter.config(written.recipe, written.architecture, ranks, "")
        yield from differing(CONFIG_FILE, "", _comparable(expected), _comparable(config))
        yield from _check_base(written, config.get(BASE_KEY))
    try:
        found = read_header(directory / WEIGHTS_FILE)
    except CheckpointError as error:
        yield from_error(directory, WEIGHTS_FILE, error)
        return {}
    specs = {spec.name: spec for spec in written.adapter.file_specs(ranks)}
    if found.keys() - specs.keys() or written.report.totals.get("whole_bytes"):
        whole = _whole(written, ranks)
        specs |= {name: TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in whole.items()}
        yield from _check_whole(written, whole, found)
    problems = {name: compare(directory, directory / WEIGHTS_FILE, specs[name], found.get(name)) for name in specs}
    yield from filter(None, problems.values())
    for name in sorted(found.keys() - specs.keys()):
        yield Finding(WEIGHTS_FILE, f"tensor '{name}' belongs to no layer of the report")
    sound = {name: tensor for name, tensor in found.items() if name in specs and not problems[name]}
    return written.adapter.split(ranks, sound)


def _whole(written: Written, ranks: list[tuple[LinearModule, int]]) -> dict[str, StoredTensor]:
    """Return the base's tensors that the adapter's file holds too, as PEFT trains them whole, by their names there."""
    checkpoint = Checkpoint(written.directory, written.config, written.tensors)
    found = whole_parameters(Skeleton.of(checkpoint), written.recipe, written.adapter, written.architecture, ranks)
    names = written.architecture.names_in(checkpoint)
    places = {name: names.find(own) for name, own in found.items()}
    return {name: tensor for name, tensor in places.items() if tensor is not None}


def _check_whole(written: Written, whole: dict[str, StoredTensor], found: dict[str, StoredTensor]) -> Iterator[Finding]:
    """Name what is trained whole and does not start as the base has it."""
    nbytes = sum(tensor.nbytes for tensor in whole.values())
    if nbytes != written.report.totals.get("whole_bytes", 0):
        yield Finding(REPORT_NAME, "totals: whole_bytes", nbytes, written.report.totals.get("whole_bytes"))
    for name in whole.keys() & found.keys():
        same = (found[name].dtype, found[name].shape) == (whole[name].dtype, whole[name].shape)
        if same and not all(map(torch.equal, found[name].chunks(), whole[name].chunks())):
            yield Finding(WEIGHTS_FILE, f"tensor '{name}' is not what the base has")


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without what is free in it; target modules, which are a set, in order."""
    targets = config.get("target_modules")
    ordered = sorted(map(str, targets)) if isinstance(targets, list) else targets
    return {key: value for key, value in config.items() if key not in FREE} | {"target_modules": ordered}


def _check_base(written: Written, named: Any) -> Iterator[Finding]:
    here = str(written.directory.resolve())
    if not isinstance(named, str) or not named:
        yield Finding(CONFIG_FILE, BASE_KEY, here, named, moved=True)
    elif not Path(named).is_absolute() and not Path(named).exists():
        yield Finding(CONFIG_FILE, f"the base is '{named}' on the Hub, which was not looked at", grave=False)
    elif str(Path(named).resolve()) != here:
        # PeftModel.from_pretrained(base, DIR) asks nobody; AutoPeftModel and some trainers load what stands here.
        if not Path(named).exists():
            what = "the directory was moved; who loads the base that the adapter names (AutoPeftModel) will not find it"
            yield Finding(CONFIG_FILE, what, here, named, grave=False, moved=True)
        elif _is_copy(written.report, Path(named)):
            what = "this is a copy; who loads the base that the adapter names (AutoPeftModel) gets the original's"
            yield Finding(CONFIG_FILE, what, here, named, grave=False, moved=True)
        else:
            yield Finding(CONFIG_FILE, f"{BASE_KEY}, which is another model", here, named, moved=True)


def _is_copy(report: Report, other: Path) -> bool:
    """Whether another directory holds a run with the same layers, errors and all."""
    try:
        return Report.read(other).layers == report.layers
    except ReportError:
        return False


def point_to(directory: Path) -> None:
    """Make the adapter name the directory, where it is now, as its base, and SHA256SUMS know of it."""
    config = read_json(directory / CONFIG_FILE, "the adapter is incomplete; run qinit again")
    config[BASE_KEY] = str(directory.resolve())
    temporary = directory / ADAPTER_DIRECTORY / f".{CONFIG_NAME}.tmp"
    temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    temporary.replace(directory / CONFIG_FILE)
    refresh(directory, [CONFIG_FILE])
