"""What tests in many folders need: numbers to try things on, plans and runs of tiny models, files to look into.

torch and qinit are imported on first use only, as in tests.models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from qinit.plan.plan import Plan
    from qinit.text.samples import Samples


def most_allocated(run: Callable[[], Any]) -> int:
    """Return how many bytes of tensors were in memory at once while something ran, beside what was there before."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    recorded = profiler.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in recorded if event.name() == "[memory]"]
    return max(accumulate(change for _, change in sorted(changes)))


def gauss(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Return normal numbers with standard deviation `scale`, the same for the same seed. Weights have about 0.02."""
    import torch

    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plan_of(source: Path, name: str = "tiny", **options: Any) -> Plan:
    """Plan a run on a checkpoint, at rank 4, without calibration and check unless told otherwise."""
    from qinit.planner.make import make_plan
    from qinit.recipe import make_recipe

    recipe = make_recipe(**{"model": str(source), "rank": 4, "calibration": "none", "check": False, **options})
    return make_plan(recipe, source, name, None if recipe.base is None else Path(recipe.base))


def calibrated_plan(source: Path, **options: Any) -> Plan:
    """Plan a run whose layers see a little text: dense, so that every shape is quantized, in groups that are not filled
    up."""
    text = {"calibration": "random", "calibration_samples": 8, "calibration_length": 32}
    return plan_of(source, source.name, **{**text, "format": "dense", "group_size": 32, "device": "cpu", **options})


def random_samples(count: int = 7, length: int = 12, seed: int = 0) -> Samples:
    import torch

    from qinit.text.samples import Samples

    tokens = torch.randint(3, 250, (count, length), generator=torch.Generator().manual_seed(seed))
    return Samples(tokens, None, "a test")


def padded(samples: Samples, lengths: list[int], padding: int = 0) -> Samples:
    """The same samples, cut to `lengths` and padded on the right."""
    import torch

    from qinit.text.samples import Samples

    mask = torch.arange(samples.tokens.shape[1]) < torch.tensor(lengths)[:, None]
    return Samples(samples.tokens.masked_fill(~mask, padding), mask, samples.origin)


def quantize(source: Path, out: Path, *, overwrite: bool = False, **options: Any) -> Any:
    """Run qinit on a checkpoint, rank 4, one round and no calibration unless told otherwise; returns the report."""
    from qinit.events import Finished
    from qinit.runner.run import run

    *_, last = run(plan_of(source, str(source), **{"iter": 1, **options}), out, overwrite=overwrite)
    assert isinstance(last, Finished)
    return last.report


def repair(source: Path, base: Path, out: Path, **options: Any) -> Any:
    """Make an adapter of rank 4 for a base that exists, without calibration unless told otherwise; returns the
    report."""
    from qinit.events import Finished
    from qinit.runner.run import run

    *_, last = run(plan_of(source, str(source), base=str(base), **options), out)
    assert isinstance(last, Finished)
    return last.report


def exhausted(events: Generator[Any, None, Any]) -> tuple[Any, list[Any]]:
    """Run a generator to its end; returns its result and what it yielded."""
    seen = []
    while True:
        try:
            seen.append(next(events))
        except StopIteration as stop:
            return stop.value, seen


def contents(directory: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a directory."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def weights_of(directory: Path) -> dict[str, bytes]:
    """Return the bytes of every safetensors file below a directory."""
    return {str(file.relative_to(directory)): file.read_bytes() for file in sorted(directory.rglob("*.safetensors"))}


def names(directory: Path) -> list[str]:
    """Return the names in a directory, hidden ones too."""
    return sorted(path.name for path in directory.iterdir())


def everything(directory: Path) -> list[str]:
    """Return all files and directories below, hidden ones too."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def edit_json(file: Path, change: Callable[[Any], object]) -> None:
    """Let `change` change what a JSON file holds."""
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def edit_config(directory: Path, **changes: Any) -> None:
    """Change values of a checkpoint's config.json; None takes one out."""

    def change(config: dict[str, Any]) -> None:
        config |= changes
        for key in [key for key, value in config.items() if value is None]:
            del config[key]

    edit_json(directory / "config.json", change)


def edit_tensors(file: Path, change: Callable[[Any], object]) -> None:
    """Let `change` change the tensors, by name, that a safetensors file holds."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def rewrite_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the parsed header of a safetensors file and write it back over the data, its length fixed."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    new = json.dumps(header).encode()
    file.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + length :])
