"""Runs that are broken off, gone on with, and compared with runs that nothing happened to."""

import json
import shutil
from pathlib import Path

from qinit.events import Done, Finished
from qinit.planner.make import make_plan
from qinit.recipe import make_recipe
from qinit.runner import layer as layer_module
from qinit.runner.run import run
from qinit.workplace.place import kept

PLAIN = {"calibration": "none", "iter": 1}
TEXT = {"calibration": "self", "calibration_samples": 8, "calibration_length": 32}
RANDOM = {**TEXT, "calibration": "random"}
# What a run may be asked for; each has other things to keep.
RUNS = {
    "data-free": {**PLAIN, "max_shard_size": "40KB"},
    "sequential": {**TEXT, "use_rslora": True, "lora_alpha": 7.0},
    "parallel": {**TEXT, "calibration_mode": "parallel", "format": "dense"},
    "mixed": {**TEXT, "ratio": 0.5},
    "mixed without calibration": {**PLAIN, "target_bits": 3.0, "format": "gptq"},
    "polish": {**RANDOM, "calibration_samples": 128, "calibration_mode": "parallel", "polish": 5},
    "whole model": {**RANDOM, "method": "lq-lora", "format": "dense"},
    "a start": {**RANDOM, "method": "lora-ga", "use_dora": True},
}


def start(source, out, *, overwrite=False, **options):
    """Return the events of a run, which goes as far as they are asked for."""
    recipe = make_recipe(**{"model": str(source), "rank": 4, "check": False, **options})
    base = None if recipe.base is None else Path(recipe.base)
    return run(make_plan(recipe, source, str(source), base), out, overwrite=overwrite, command="qinit")


def break_off(source, out, layers, **options):
    """Break a run off after so many layers."""
    events = start(source, out, **options)
    for event in events:
        if isinstance(event, Done) and event.row is not None:
            layers -= 1
        if not layers:
            events.close()
    assert kept(out)


def finish(source, out, **options):
    """Carry a run out to its end; returns its events."""
    events = list(start(source, out, **options))
    assert isinstance(events[-1], Finished)
    return events


def result_in(directory):
    """Return all files of a finished run; its report without the times and the memory, its list without that sum."""
    files = {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}
    report = json.loads(files.pop("qinit.json"))
    assert report["totals"].pop("seconds") > 0
    assert report["totals"].pop("peak_memory_bytes") > 0
    assert "check" not in report["totals"] or report["totals"]["check"].pop("seconds") > 0
    assert all(layer.pop("seconds") >= 0 for layer in report["layers"])
    lines = files.pop("SHA256SUMS").splitlines()
    return {**files, "qinit.json": report, "SHA256SUMS": [line for line in lines[:-1] if b"qinit.json" not in line]}


def undisturbed(source, place, **options):
    """Return the contents of a run that nothing happens to, at the place that the other will have."""
    finish(source, place / "out", **options)
    found = result_in(place / "out")
    shutil.rmtree(place / "out")
    return found


class Crash(BaseException):
    """What no code is prepared for."""


def fail_at_layer(monkeypatch, number, error):
    """Let the `number`-th solve raise."""
    calls = iter(range(1, 100))
    real = layer_module.solve

    def solve(*args):
        if next(calls) == number:
            raise error
        return real(*args)

    monkeypatch.setattr(layer_module, "solve", solve)
