"""What the benchmarks share: run a method, load what it wrote with the stock loaders, measure the start."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import tempfile
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tables import KINDS

from qinit.adapters import ADAPTER_DIRECTORY
from qinit.evaluate.figures import Figures, figures_of
from qinit.events import Finished
from qinit.machine import ran_on, versions
from qinit.planner.make import make_plan
from qinit.recipe import make_recipe
from qinit.report.report import REPORT_NAME, Report
from qinit.runner.run import run
from qinit.solver.methods import METHODS

# In the environment: part of the command that a result is kept with.
SETTINGS = ("THP_MEM_ALLOC_ENABLE", "OMP_WAIT_POLICY")

# Other packages talk about themselves while they are imported, so transformers comes later, where it is used.
logging.disable(logging.WARNING)
warnings.filterwarnings("ignore", category=FutureWarning)
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


@dataclass(frozen=True)
class Start:
    """Where fine-tuning would start: a report and the figures of base + adapter, as a trainer loads them."""

    method: str
    report: Report
    figures: Figures
    seconds: float


def load_tokens(model: Path, text: str) -> torch.Tensor:
    """Tokenize a text with a checkpoint's own tokenizer, without special tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def load_for_training(directory: Path, dtype: torch.dtype | str = "auto") -> Any:
    """Load base and adapter just as the model card says, without the loaders' banners."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        base = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        return PeftModel.from_pretrained(base, directory, subfolder=ADAPTER_DIRECTORY, is_trainable=True)


def quantize(model: Path, out: Path, method: str, **options: Any) -> Report:
    """Run one method; peers on the normal-float grid are stored dense, as no packed format holds it."""
    packed = METHODS[method].grid == "int"
    recipe = make_recipe(
        model=str(model), method=method, **{"format": "gptq" if packed else "dense", "check": False, **options}
    )
    *_, last = run(make_plan(recipe, model, model.name), out)
    assert isinstance(last, Finished)
    return last.report


def measure_start(
    model: Path, tokens: torch.Tensor, window: int, method: str, *, reference: Any = None, **options: Any
) -> Start:
    """Quantize into a temporary directory, load with transformers and peft, and measure it on a text; beside the
    `reference`, the model in full precision, its KL divergence from that too."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "run"
        started = time.perf_counter()
        report = quantize(model, out, method, **options)
        return measure_run(out, report, tokens, window, reference, time.perf_counter() - started)


def measure_kept(
    run: Path, model: Path, tokens: torch.Tensor, window: int, method: str, *, reference: Any, **options: Any
) -> Start:
    """Do the same with a run that stays, and is not made again where it is there; its seconds are those of its report.
    One that was broken off goes on."""
    report = Report.read(run) if (run / REPORT_NAME).is_file() else quantize(model, run, method, **options)
    return measure_run(run, report, tokens, window, reference, report.totals["seconds"])


def measure_run(run: Path, report: Report, tokens: torch.Tensor, window: int, reference: Any, seconds: float) -> Start:
    figures = figures_of(load_for_training(run, torch.float32), tokens, window, reference=reference)
    return Start(report.recipe["method"], report, figures, seconds)


def full_precision(model: Path) -> Any:
    """Load the source checkpoint."""
    from transformers import AutoModelForCausalLM

    with redirect_stderr(StringIO()):
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def show(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a table that is wide enough to paste."""
    table = Table(*header, title=title, title_justify="left", box=None)
    for row in rows:
        table.add_row(*row)
    Console(width=140, highlight=False).print(table)


def conclude(kind: str, result: dict[str, Any], file: Path | None, seeds: list[int] | None = None) -> None:
    """Print a result's tables and, if asked to, keep it as model_zoo/results does: with the command, the versions and
    the machine. Arguments that are files are named without their directories."""
    whole = {
        "kind": kind,
        "command": _command(),
        "versions": versions(),
        "machine": ran_on(),
        "seeds": seeds,
        **result,
    }
    for table in KINDS[kind](whole):
        show(table.title, table.header, table.rows)
    if file is not None:
        file.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def _command() -> str:
    words = []
    arguments = iter(sys.argv[1:])
    for word in arguments:
        if word == "--json":  # where the result goes is no part of it
            next(arguments, None)
        elif not word.startswith("--json="):
            words.append(Path(word).name if "/" in word and Path(word).exists() else word)
    settings = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    return shlex.join([*settings, "python", f"benchmarks/{Path(sys.argv[0]).name}", *words])
