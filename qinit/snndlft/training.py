"""A whole training: base, data, Trainer, and what is written at the end."""

from __future__ import annotations

import logging
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from qinit.adapters import CONFIG_NAME
from qinit.adapters.trained import WEIGHTS_NAME
from qinit.errors import ReportError
from qinit.files.atomic import write_files
from qinit.files.manifest import write_manifest
from qinit.machine import peak_memory_bytes, pick_device, versions
from qinit.report.card import CARD_NAME
from qinit.report.pictures.files import PAGE_NAME
from qinit.report.report import REPORT_NAME
from qinit.snndlft.base import load_for_training
from qinit.snndlft.callback import DynamicLayers
from qinit.snndlft.card import card_text
from qinit.snndlft.config import SnnDlftConfig
from qinit.snndlft.course import Moment
from qinit.snndlft.model import adapt
from qinit.snndlft.page import page
from qinit.snndlft.place import Place, sum_of, working
from qinit.snndlft.report import SnnReport, make_report
from qinit.snndlft.tasks import Data, Task, read_task
from qinit.workplace.place import require_replaceable

KEPT = 2  # checkpoints
MOMENTS, CHECKPOINTS = 100, 10  # at most about so many in a training
WARM_UP = 0.06  # of the steps, linear, then down to zero: as in AdaLoRA's experiments on GLUE


@dataclass(frozen=True)
class Asked:
    """What a training was asked. `model` is its name for reports, `base` its directory, `hub` what the adapter calls
    it if it was read from the Hub: the id, and the revision if one was asked for."""

    model: str
    base: Path
    data: Data
    config: SnnDlftConfig
    steps: int = 500
    batch_size: int = 16
    learning_rate: float = 1e-3
    device: str = "auto"
    trust_remote_code: bool = False
    hub: tuple[str, str | None] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return all that the result depends on."""
        files = {name: file and str(file) for name, file in self.data.files.items()}
        return {
            "model": str(self.base.resolve()),
            "config": self.config.model_dump(mode="json"),
            **{key: getattr(self, key) for key in ("steps", "batch_size", "learning_rate", "device")},
            "data": {**asdict(self.data), **files},
            "sums": {name: file and sum_of(file) for name, file in self.data.files.items()},
            "versions": versions(),
        }


def run(
    asked: Asked,
    out: Path,
    *,
    overwrite: bool = False,
    command: str = "",
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[Moment], None] = lambda moment: None,
) -> SnnReport:
    """Train, and write adapter, tokenizer, qinit.json, a card and a page to `out`. An unfinished training that was
    asked the same goes on from its last checkpoint. `say` gets lines on what goes on. Raises QinitErrors, before the
    first weight is read where they are about options and data."""
    asked.config.require_steps(asked.steps)
    require_replaceable(out, overwrite)
    device = pick_device(asked.device)
    task = read_task(asked.data, asked.base, trust_remote_code=asked.trust_remote_code)
    with working(out, asked.to_json(), command) as place:
        if place.differs is not None:
            say(f"starting anew: {place.differs} was another in the unfinished training")
        elif place.last is not None:
            say(f"going on from {Path(place.last).name}")
        report, model = _train(asked, task, place, device, command, say, progress)
        _write(report, model, task, asked.hub, place.run, say)
        place.finish()
    return report


def _write(
    report: SnnReport,
    model: Any,
    task: Task,
    hub: tuple[str, str | None] | None,
    directory: Path,
    say: Callable[[str], None],
) -> None:
    """Write adapter, tokenizer, report, card, page and the list of their sums."""
    if hub is not None:
        config = model.peft_config[model.active_adapter]
        config.base_model_name_or_path, config.revision = hub
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a module whose triplets are all masked has an adapter of rank 0
        model.save_pretrained(directory)
    shutil.copymode(directory / CONFIG_NAME, directory / WEIGHTS_NAME)  # safetensors lets the user alone read it
    task.tokenizer.save_pretrained(directory)
    files = {REPORT_NAME: report.to_json().encode(), CARD_NAME: card_text(report).encode()}
    try:
        files[PAGE_NAME] = page(report).encode()
    except ReportError as error:
        say(f"note: {error}")
    write_files(directory, files)
    write_manifest(directory)


def _train(
    asked: Asked,
    task: Task,
    place: Place,
    device: torch.device,
    command: str,
    say: Callable[[str], None],
    progress: Callable[[Moment], None],
) -> tuple[SnnReport, Any]:
    set_seed(asked.data.seed)  # the head's and the adapters' start
    base, new = load_for_training(asked.base.resolve(), task.classes, device, trust_remote_code=asked.trust_remote_code)
    notes = (f"random at the start, and trained: {', '.join(new)}",) if new else ()
    base.config.use_cache = False
    if base.config.pad_token_id is None:
        base.config.pad_token_id = task.tokenizer.pad_token_id
    model = adapt(base, asked.config, task.task_type, new)
    before = task.measure(model)
    say(f"{task.metric} before: {before:.4f}")
    callback = DynamicLayers(asked.config, progress)
    trainer = _trainer(asked, task, model, place, device, callback)
    started = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    trainer.train(resume_from_checkpoint=place.last)
    course = callback.course
    assert course is not None
    seconds = time.perf_counter() - started
    head = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name)
    measured = {
        **{"metric": task.metric, "before": before, "after": task.measure(model), "head": head},
        "seconds_per_step": seconds / max(1, trainer.state.global_step - trainer._initial_global_step),
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory_bytes(),
    }
    training = {**{key: value for key, value in asked.to_json().items() if key != "config"}, "model": asked.model}
    report = make_report(
        course,
        model=asked.model,
        command=command,
        training=training,
        classes=task.classes,
        measured=measured,
        notes=notes,
    )
    return report, model


def _trainer(
    asked: Asked, task: Task, model: Any, place: Place, device: torch.device, callback: DynamicLayers
) -> Trainer:
    options: dict[str, Any] = {
        **{"max_steps": asked.steps, "per_device_train_batch_size": asked.batch_size, "seed": asked.data.seed},
        **{"learning_rate": asked.learning_rate, "warmup_steps": int(WARM_UP * asked.steps)},
        **{"logging_steps": max(1, asked.steps // MOMENTS), "save_steps": max(1, asked.steps // CHECKPOINTS)},
        **{"save_total_limit": KEPT, "use_cpu": device.type == "cpu", "bf16": device.type == "cuda"},
        **{"report_to": [], "disable_tqdm": True, "remove_unused_columns": False, "dataloader_pin_memory": False},
    }
    arguments = TrainingArguments(str(place.checkpoints), **options)
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=task.examples,
        data_collator=task.collate,
        callbacks=[callback],  # type: ignore[arg-type]
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
