"""Writes what a trainer needs for a run or for a template."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from qinit.errors import OutputError, RecipeError, did_you_mean
from qinit.files.reading import JSON_BYTES, parse_json, printable, read_regular
from qinit.report.report import REPORT_NAME
from qinit.source.checkpoint import ADAPTER_CONFIG
from qinit.trainers import TRAINERS, TrainableRun, Trainer
from qinit.trainers.templates import WRITERS, Template
from qinit.trainers.training import RATE, Training, compared_rate

ALIASES = {"llamafactory": "llama-factory", "peft": "transformers"}


@dataclass(frozen=True)
class Written:
    """A script or a configuration, the name of a file for it, the command that takes a `{file}` of it, and the trainer
    that this needs, by its package, its name among people and how it is installed."""

    text: str
    file: str
    command: str
    distribution: str
    title: str
    install: str

    def command_for(self, file: Path) -> str:
        return self.command.format(file=shlex.quote(str(file)))


def trainer_named(name: str) -> Trainer:
    """Look a trainer up. Raises RecipeError."""
    name = ALIASES.get(name, name)
    if name not in TRAINERS:
        known = (*TRAINERS, *ALIASES)
        raise RecipeError(f"--trainer: no '{name}'{did_you_mean(name, known)}; known are {', '.join(TRAINERS)}")
    return TRAINERS[name]


def config_for(target: Path, name: str, dataset: str, compared: Path | None = None, *, bf16: bool = True) -> Written:
    """Return the script or the configuration with which a trainer goes on from a run, or starts from a template: an
    adapter configuration, one that comes with qinit by its name, or an adapter that PEFT has started. The learning rate
    is the one that a comparison's file, if given, has for the method and the width. Without `bf16` it is for a CPU.

    Raises RecipeError for a trainer or a template that there is not and for what does not fit together, ReportError
    and CheckpointError for a directory that is no finished run.
    """
    trainer = trainer_named(name)
    if printable(str(target)) != str(target):
        raise RecipeError(f"{printable(str(target))}: a path that cannot be printed cannot be written; rename it")
    alone = (target / ADAPTER_CONFIG).is_file() and not (target / REPORT_NAME).exists()
    if not alone and (target.is_dir() or (target.suffix != ".json" and len(target.parts) > 1)):
        run = TrainableRun.open(target)
        if problem := trainer.cannot_take(run):
            raise RecipeError(f"--trainer {name}: {problem}")
        rate = _rate(compared, str(run.report.recipe.get("method")), run.bits)
        text = trainer.config(run, Training.on(dataset, rate, bf16=bf16))
        return _written(text, f"{run.directory.name}-{trainer.name}{trainer.suffix}", trainer.command, trainer)
    template = Template.open(target)
    writer = WRITERS.get(trainer.name)
    if writer is None:
        raise RecipeError(
            f"--trainer {name}: takes runs alone; templates are for {', '.join(WRITERS)}, or write a start with "
            "`qinit adapter`"
        )
    training = Training.on(dataset, _rate(compared, template.method, template.bits), bf16=bf16)
    if problem := writer.cannot_write(template, training):
        raise RecipeError(f"--trainer {name}: {problem}")
    return _written(
        writer.write(template, training), f"{template.name}-{writer.name}{writer.suffix}", writer.command, trainer
    )


def _written(text: str, file: str, command: str, trainer: Trainer) -> Written:
    install = " && ".join(trainer.install) or f"pip install {trainer.distribution}"
    return Written(text, file, command, trainer.distribution, trainer.title, install)


def _rate(compared: Path | None, method: str, bits: int) -> float:
    if compared is None:
        return RATE
    try:
        results = parse_json(read_regular(compared, JSON_BYTES))
    except OSError as error:
        raise RecipeError(f"{compared}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise RecipeError(f"{compared}: not valid JSON ({error})") from None
    return compared_rate(results, str(compared), method, bits)


def write_config(text: str, out: Path) -> None:
    """Write it to a file that is not there yet. Raises OutputError."""
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise OutputError(f"{out}: exists; choose another file with --out") from None
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror})") from None
