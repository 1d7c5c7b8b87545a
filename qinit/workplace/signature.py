"""What the bytes of a run depend on: an unfinished one is gone on with only where all of it is the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from qinit.machine import versions
from qinit.plan.plan import Plan
from qinit.recipe import BUNDLED
from qinit.source.checkpoint import Checkpoint
from qinit.text.bundled import calibration_documents

NO_MATTER = ("python", "peft")  # versions that change no byte of the weights
UNSIGNED = {"check"}  # options that change no byte of the weights
HASH = "sha256:"
MOST = 8
BROUGHT = "the text that qinit brings"
PIECES, PIECE_BYTES = 16, 4096


def signature(plan: Plan, device: torch.device, polished: str | None = None) -> dict[str, Any]:
    """Return it flat, by names that a user knows: the recipe's options, the source's files, versions, the device, and
    where a finished run is polished further, that run by the sums of its files.

    Of the source that is the configuration, the headers, and size and time of each weight file, not what is in it.
    """
    found = _signature(plan, device, _size_and_time)
    if polished is not None:
        found["the run that is polished"] = _digest(polished)
    return found


def signature_of_process(plan: Plan, device: torch.device) -> dict[str, Any]:
    """Return what the processes of one run must have in common: the signature without what a machine may choose for
    itself, and of a weight file, which each machine may have fetched, not its time but a part of what is in it."""
    found = _signature(plan, device, _size_and_pieces)
    chosen = chosen_here(plan)
    return {key: value for key, value in found.items() if key not in chosen and not (chosen and key == BROUGHT)}


def chosen_here(plan: Plan) -> tuple[str, ...]:
    """Name the options that were chosen by the memory and the speed of this machine."""
    calibration = ("calibration", "calibration_samples") if plan.calibration_reason else ()
    return (*calibration, *(("polish",) if plan.polish_reason else ()))


def _signature(plan: Plan, device: torch.device, state: Callable[[Path], str]) -> dict[str, Any]:
    found: dict[str, Any] = plan.recipe.model_dump(mode="json", exclude=UNSIGNED)
    found["model's name"] = plan.model_name
    found |= _checkpoint("the model", plan.checkpoint, state)
    if plan.given is not None:
        found |= _checkpoint("the base", plan.given.checkpoint, state)
    text = Path(plan.recipe.calibration)
    if BUNDLED in (plan.recipe.calibration, plan.polish_source):
        found[BROUGHT] = _digest(calibration_documents())
    elif plan.recipe.calibrated and text.is_file():
        with text.open("rb") as handle:
            found[f"the text in {text}"] = HASH + hashlib.file_digest(handle, "sha256").hexdigest()
    if plan.recipe.mixed and not plan.pending:
        widths = [(layer.target.name, layer.bits, layer.group_size, layer.rank, layer.kept) for layer in plan.layers]
        found["the layers' widths and ranks"] = _digest(widths)
    found |= {f"version of {name}": value for name, value in versions().items() if name not in NO_MATTER}
    found["device in use"] = device.type if device.type == "cpu" else torch.cuda.get_device_name(device)
    found["threads (OMP_NUM_THREADS)"] = torch.get_num_threads()
    return found


def _checkpoint(whose: str, checkpoint: Checkpoint, state: Callable[[Path], str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    found[f"{whose}'s config.json"] = _digest(sorted(checkpoint.config.items(), key=lambda item: item[0]))
    found[f"{whose}'s tensors"] = _digest(
        [(name, str(t.dtype), t.shape, t.file.name, t.offset) for name, t in sorted(checkpoint.tensors.items())]
    )
    for file in sorted({tensor.file for tensor in checkpoint.tensors.values()}):
        found[f"{whose}'s {file.name}"] = state(file)
    return found


def _size_and_time(file: Path) -> str:
    stat = file.stat()
    seconds, rest = divmod(stat.st_mtime_ns, 10**9)
    when = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
    return f"{stat.st_size} bytes of {when}.{rest:09d} UTC"


def _size_and_pieces(file: Path) -> str:
    """Read PIECES of a file from all over it: another revision of a model differs everywhere."""
    size, read = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as handle:
        for number in range(PIECES):
            handle.seek(max(0, size - PIECE_BYTES) * number // (PIECES - 1))
            read.update(handle.read(PIECE_BYTES))
    return f"{size} bytes with {read.hexdigest()[:16]} in pieces of it"


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Say what two signatures differ in, a phrase each, up to MOST of them."""
    names = [name for name in (*now, *(n for n in then if n not in now)) if then.get(name) != now.get(name)]
    found = [_difference(name, then.get(name), now.get(name)) for name in names[:MOST]]
    return found + ([f"and {len(names) - MOST} more"] if len(names) > MOST else [])


def _digest(value: Any) -> str:
    return HASH + hashlib.sha256(repr(value).encode()).hexdigest()


def _difference(name: str, then: Any, now: Any) -> str:
    if all(isinstance(value, str) and value.startswith(HASH) for value in (then, now)):
        return f"{name} changed"
    before, after = ("not given" if value is None else value for value in (then, now))
    return f"{name} was {before}, now {after}"
