"""What `qinit snndlft` wrote, reread: hashes, the report against the adapter, values, and whether it loads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qinit.adapters import CONFIG_NAME
from qinit.adapters.trained import WEIGHTS_NAME, read_trained
from qinit.errors import HubError, QinitError, RecipeError
from qinit.evaluate.loaded import SHARE, loaded_bytes
from qinit.evaluate.subject import Subject
from qinit.files.tensors import StoredTensor, read_header
from qinit.machine import free_memory
from qinit.recipe_files import SPIKING
from qinit.report.report import REPORT_NAME
from qinit.snndlft.layers import BLOCK
from qinit.snndlft.model import base_of, load
from qinit.snndlft.report import SnnReport
from qinit.source.checkpoint import count_nonfinite
from qinit.verification.files import check_files
from qinit.verification.findings import Checked, Event, Finding, Stage, from_error

TOKENS = 8  # that the loaded model reads


def verify_training(directory: Path, *, trust_remote_code: bool = False) -> Iterator[Event]:
    """Check a training's directory: hashes, the adapter's type and ranks against its report, finite values; then load
    it with its base and run it.

    Yields Stage and Checked as it goes, and a Finding for everything that is not as it should be.
    """
    yield from check_files(directory)
    file = REPORT_NAME
    try:
        report = SnnReport.read(directory)
        file = CONFIG_NAME
        settings = read_trained(directory)
        file = WEIGHTS_NAME
        tensors = read_header(directory / WEIGHTS_NAME)
    except QinitError as error:
        yield from_error(directory, file, error)
        return
    sound = True
    for event in _checked(report, settings, tensors):
        sound = sound and not isinstance(event, Finding)
        yield event
    if sound:
        yield from _loaded(directory, report, settings, trust_remote_code)


def _checked(report: SnnReport, settings: dict[str, Any], tensors: dict[str, StoredTensor]) -> Iterator[Event]:
    expected = SPIKING if report.spiking else "ADALORA"
    if (found := settings.get("peft_type")) != expected:
        yield Finding(CONFIG_NAME, "peft_type", expected, found)
    ranks = dict.fromkeys((row.name for row in report.layers), 0)
    yield Stage("values", sum(tensor.nbytes for tensor in tensors.values()))
    for name, tensor in tensors.items():
        module, part, _ = name.removeprefix("base_model.model.").rpartition(".lora_E")
        if part:
            block = BLOCK.match(module)
            layer = block[0] if block else module
            ranks[layer] = ranks.get(layer, 0) + tensor.shape[0]
        if bad := sum(count_nonfinite(chunk.view(tensor.dtype)) for chunk in tensor.chunks()):
            yield Finding(WEIGHTS_NAME, f"tensor '{name}' holds {bad} NaN or Inf among {tensor.numel} values")
        yield Checked("tensor", name, tensor.nbytes)
    for row in report.layers:
        if ranks[row.name] != row.ranks:
            yield Finding(WEIGHTS_NAME, f"{row.name}: triplets", row.ranks, ranks[row.name])
    for name in ranks.keys() - {row.name for row in report.layers}:
        yield Finding(WEIGHTS_NAME, f"{name}: is no layer of the report")


@torch.no_grad()
def _loaded(directory: Path, report: SnnReport, settings: dict[str, Any], trust_remote_code: bool) -> Iterator[Event]:
    yield Stage("loading it", 0)
    try:
        base = base_of(directory, settings)
        needed, free = loaded_bytes(Subject("", base, directory), torch.float32), free_memory(torch.device("cpu"))
        if needed > SHARE * free:
            sizes = f"the base takes {needed / 1e9:.1f} GB to load, and {free / 1e9:.1f} GB are free"
            yield Finding(CONFIG_NAME, f"{sizes}: it was not loaded", grave=False)
            return
        model = load(directory, trust_remote_code=trust_remote_code)
    except (HubError, RecipeError) as error:
        yield Finding(CONFIG_NAME, f"was not loaded ({error})", grave=False)
        return
    except QinitError as error:
        yield from_error(directory, CONFIG_NAME, error)
        return
    logits = model.eval()(input_ids=torch.arange(1, 1 + TOKENS)[None]).logits
    if not bool(logits.isfinite().all()):
        yield Finding(WEIGHTS_NAME, "the loaded model predicts NaN or Inf")
        return
    kind = "spiking adapter" if report.spiking else "AdaLoRA adapter"
    yield Checked("loaded", f"loaded by qinit.snndlft: {report.model} with its {kind}, run over {TOKENS} tokens", 0)
