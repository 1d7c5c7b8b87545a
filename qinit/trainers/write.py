"""Writes what a trainer needs for a run."""

from __future__ import annotations

from pathlib import Path

from qinit.errors import OutputError, RecipeError, did_you_mean
from qinit.files.reading import printable
from qinit.trainers import TRAINERS, TrainableRun, Trainer


def trainer_named(name: str) -> Trainer:
    """Look a trainer up. Raises RecipeError."""
    if name not in TRAINERS:
        raise RecipeError(f"--trainer: no '{name}'{did_you_mean(name, TRAINERS)}; known are {', '.join(TRAINERS)}")
    return TRAINERS[name]


def config_for(directory: Path, name: str, data: Path) -> str:
    """Return the script or the configuration with which a trainer goes on from a run, on a file of texts.

    Raises RecipeError for a trainer that there is not or that cannot take the run, ReportError and CheckpointError for
    a directory that is no finished run.
    """
    trainer = trainer_named(name)
    for path in (directory, data):
        if printable(str(path)) != str(path):
            raise RecipeError(f"{printable(str(path))}: a path that cannot be printed cannot be written; rename it")
    run = TrainableRun.open(directory)
    if problem := trainer.cannot_take(run):
        raise RecipeError(f"--trainer {name}: {problem}")
    return trainer.config(run, data)


def write_config(text: str, out: Path) -> None:
    """Write it to a file that is not there yet. Raises OutputError."""
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise OutputError(f"{out}: exists; choose another file with --out") from None
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror})") from None
