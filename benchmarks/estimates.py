"""How long a run was said to take, and how long it took.

    THP_MEM_ALLOC_ENABLE=1 OMP_WAIT_POLICY=passive python benchmarks/estimates.py [--demo] [--model DIR ...]
        [--random-0.5B] [--cases self,none] [--busy] [--repeats 1] [--json FILE]

The environment is what the command line sets for itself.

Each model is run with its own text, with text that is there, in parallel, and with a polish; `--random-0.5B` adds a
random model with the shapes of Qwen2.5-0.5B, made on the spot, with few samples. The estimate is made just before the
run, as the command line makes it; the parts of the run are those of `--debug`. `--busy` lets another process keep a
core busy meanwhile. The goal is a ratio between 1 / 1.5 and 1.5.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import conclude

from qinit.clock import Clock
from qinit.machine import pick_device
from qinit.planner.make import make_plan
from qinit.planner.time import Estimate, estimate
from qinit.recipe import make_recipe
from qinit.runner.run import run
from qinit.source.demo import demo_directory
from qinit.steps import finish

SMALL = {"calibration_samples": 32, "calibration_length": 256}
FEW = {"calibration_samples": 16, "calibration_length": 128}
CASES: dict[str, dict[str, Any]] = {
    "self": {"calibration": "self"},
    "random": {"calibration": "random", "check": False},
    "parallel": {"calibration": "random", "calibration_mode": "parallel", "check": False},
    "polish": {"calibration": "random", "polish": 20, "check": False},
    "none": {"calibration": "none"},
}
ON_A_LARGE_MODEL = ("self", "none")
# The parts of a run as the clock tells them apart, by the part of the estimate that they belong to.
PARTS = {
    "text": ("text",),
    "calibrating": ("forward", "statistics", "pass back"),
    "allocating": ("sensitivity",),
    "solving": ("solving",),
    "writing": ("reading", "writing"),
    "polishing": ("polish",),
    "checking": ("check",),
}
QWEN_HALF_B = {
    **{"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151936},
    **{"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True, "bos_token_id": 151643},
}


def make_half_b(directory: Path) -> Path:
    """Save a random model with the shapes of Qwen2.5-0.5B in bfloat16."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**QWEN_HALF_B)).to(torch.bfloat16).save_pretrained(directory)
    return directory


@contextmanager
def neighbour(busy: bool) -> Iterator[None]:
    """Keep one core busy with another process, if asked to."""
    if not busy:
        yield
        return
    process = multiprocessing.get_context("spawn").Process(target=_spin, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join()


def _spin() -> None:
    torch.set_num_threads(1)
    x = torch.ones(512, 512)
    while True:
        x @ x


def measured(model: Path, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Estimate a run and carry it out; returns the seconds of both and of their parts."""
    plan = make_plan(make_recipe(model=str(model), **options), model, model.name)
    started = time.perf_counter()
    said = estimate(plan, pick_device(plan.recipe.device))
    asked = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as place, Clock() as clock:
        finish(run(plan, Path(place) / "run"))
    split = clock.split()
    real = {part: sum(split.get(section, 0.0) for section in sections) for part, sections in PARTS.items()}
    return {
        "case": name,
        "asked": round(asked, 3),
        "estimate": round(said.total, 3),
        "real": round(sum(split.values()), 3),
        "parts": {part: [round(getattr(said, part), 3), round(seconds, 3)] for part, seconds in real.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="the demo model")
    parser.add_argument(
        "--model", type=Path, action="append", default=[], help="a checkpoint, as benchmarks/smollm2.py"
    )
    parser.add_argument("--random-0.5B", dest="half_b", action="store_true", help="a random model of that shape")
    parser.add_argument("--cases", default=",".join(CASES), help="some of the runs")
    parser.add_argument("--busy", action="store_true", help="beside a neighbour that keeps a core busy")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path, help="keep the result there")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place, neighbour(given.busy):
        models = [(demo_directory(), SMALL)] if given.demo else []
        models += [(model, SMALL) for model in given.model]
        if given.half_b:
            models.append((make_half_b(Path(place) / "random-0.5B"), FEW))
        if models:  # kernels are compiled and libraries are loaded once, and not by the first run that counts
            warm_up = make_recipe(model=str(demo_directory()), calibration="random", **FEW)
            finish(run(make_plan(warm_up, demo_directory(), "demo"), Path(place) / "warm-up"))
        for model, size in models:
            for name in given.cases.split(","):
                if size is FEW and name not in ON_A_LARGE_MODEL:
                    continue
                options = CASES[name] | ({} if name == "none" else size)
                for _ in range(given.repeats):
                    rows.append({"model": model.name, **measured(model, name, options)})
                    print(f"{model.name} {name}: {rows[-1]['estimate']:.1f} / {rows[-1]['real']:.1f} s", flush=True)
    conclude("estimates", {"busy": given.busy, "threads": torch.get_num_threads(), "rows": rows}, given.json)


if __name__ == "__main__":
    assert PARTS.keys() == Estimate.__dataclass_fields__.keys()
    main()
