"""One cell: quantize, load base and adapter as a trainer does, measure, fine-tune, measure again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from qinit.compare.comparison import FULL, LORA, Cell, Comparison, Row
from qinit.errors import OutputError
from qinit.evaluate.figures import perplexity
from qinit.loading import load, load_parts
from qinit.machine import pick_device
from qinit.recipe import make_recipe
from qinit.report.report import REPORT_NAME, Report
from qinit.runner.run import run
from qinit.solver.methods import STARTS
from qinit.source.checkpoint import read_json
from qinit.train.finetune import DivergedError, finetune

MOST_LOGITS = 2**28  # values: a gigabyte in float32
Progress = Callable[[int, float], None]


def kept_result(comparison: Comparison, cell: Cell) -> dict[str, Any] | None:
    """Return what a finished cell has found; None for one that is unfinished, or was made under other conditions."""
    try:
        value = json.loads(comparison.file(cell).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) and value.get("signature") == comparison.digest(cell) else None


def work(comparison: Comparison, cell: Cell, progress: Progress = lambda step, loss: None) -> dict[str, Any]:
    """Do what a cell needs, store it under its digest and return it."""
    started = time.perf_counter()
    found = _start(comparison, cell.row) if cell.rate is None else _tuned(comparison, cell, progress)
    value = {"signature": comparison.digest(cell), **found, "seconds": round(time.perf_counter() - started, 2)}
    write_json(comparison.file(cell), value)
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a file under a temporary name and rename it. Raises OutputError."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}); finished cells are kept") from None


def ready(comparison: Comparison, row: Row) -> bool:
    """Whether fine-tuning can start from what a row's start has left on the disk."""
    return row.recipe is None or (comparison.run_directory(row) / REPORT_NAME).is_file()


def _start(comparison: Comparison, row: Row) -> dict[str, Any]:
    """Quantize, unless that was done under the same digest, and measure the start, unless that was done."""
    directory, known = comparison.run_directory(row), kept_result(comparison, Cell(row))
    if row.recipe is not None and row.run is None and not (known and ready(comparison, row)):
        for _ in run(comparison.plan(row.recipe), directory, overwrite=True):
            pass
    if known:
        return {key: value for key, value in known.items() if key not in ("signature", "seconds")}
    model = load_start(comparison, row, comparison.seeds[0])
    found: dict[str, Any] = {"perplexities": _perplexities(comparison, model)}
    found["trainable"] = sum(each.numel() for each in model.parameters() if each.requires_grad)
    if row.recipe is not None:
        report = Report.read(directory)
        found |= {"weight_error": report.totals["error"], "output_error": report.totals.get("output_error")}
        found |= {"calibration": report.totals.get("calibration")}
    return found


def _tuned(comparison: Comparison, cell: Cell, progress: Progress) -> dict[str, Any]:
    assert cell.rate is not None
    assert cell.seed is not None
    model = load_start(comparison, cell.row, cell.seed)
    started = time.perf_counter()
    training, learn, validation = comparison.learning
    try:
        finetune(model, learn.tokens, training, rate=cell.rate, seed=cell.seed, progress=progress)
    except DivergedError as diverged:
        return {"diverged": str(diverged), "validation": None, "perplexities": None}
    per_step = (time.perf_counter() - started) / training.steps
    window = min(comparison.window, len(validation.ids))
    return {
        "validation": _perplexity(model, validation.tokens, window),
        "perplexities": _perplexities(comparison, model),
        "seconds_per_step": round(per_step, 4),
    }


def load_start(comparison: Comparison, row: Row, seed: int) -> Any:
    """Load a row's model, ready to be trained; `seed` draws the adapters that PEFT would draw."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # PEFT imports packages that print banners
        return _load(comparison, row, seed)


def _load(comparison: Comparison, row: Row, seed: int) -> Any:
    device = pick_device(comparison.device)
    dtype = torch.bfloat16 if device.type == "cuda" and row.method != FULL else torch.float32
    if row.recipe is not None:
        options: dict[str, Any] = {
            "dtype": dtype,
            "device": str(device),
            "trust_remote_code": comparison.trust_remote_code,
        }
        directory = comparison.run_directory(row)
        if row.recipe.base is None:
            model = load(directory, trainable=True, **options)
        else:
            base, class_name = comparison.directory, Report.read(directory).source["class"]
            model = load_parts(base, directory, class_name, read_json(base / "config.json", ""), True, **options)
        if row.fresh:
            torch.manual_seed(seed)
            for module in model.modules():
                if hasattr(module, "reset_lora_parameters"):
                    module.reset_lora_parameters("default", True)
        return model
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        comparison.directory,
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        device_map={"": device},
        trust_remote_code=comparison.trust_remote_code,
    )
    if row.method != LORA:
        return model
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(**_same_adapters(comparison)))


def _same_adapters(comparison: Comparison) -> dict[str, Any]:
    """Return the configuration of the adapters that the other rows have: the same modules, ranks and scales."""
    recipes = [row.recipe for row in comparison.rows if row.recipe is not None]
    recipe = next((each for each in recipes if each.method not in STARTS), next(iter(recipes), make_recipe()))
    plainly: dict[str, Any] = {"calibration": "none", "format": "dense", "base": None}
    if recipe.method in STARTS:
        stabilized = recipe.use_rslora and recipe.method != "rslora"
        plainly |= {"method": make_recipe().method, "use_dora": False, "use_rslora": stabilized}
    recipe = recipe.model_copy(update=plainly)
    plan = comparison.plan(recipe)
    config = plan.adapter.config(recipe, plan.architecture, plan.ranks, "")
    return {**config, "inference_mode": False, "base_model_name_or_path": None}


def _perplexities(comparison: Comparison, model: Any) -> list[float | None]:
    return [_perplexity(model, text.tokens, comparison.window) for text in comparison.texts]


def _perplexity(model: Any, tokens: torch.Tensor, window: int) -> float | None:
    """Return the perplexity, None where it is no finite number."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    try:
        value = perplexity(model, tokens, window, min(8, max(1, MOST_LOGITS // (window * vocabulary))))
    except OverflowError:
        return None
    return value if value < float("inf") else None
