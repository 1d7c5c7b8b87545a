"""Trainers that are installed beside what does not fit them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement

from qinit.trainers import TRAINERS, Trainer


@dataclass(frozen=True)
class Misfit:
    """A trainer that is installed, what does not fit it in words, and the pip commands, in this order, that make an
    environment of its own in which it trains from a run."""

    trainer: str
    version: str
    problems: tuple[str, ...]
    commands: tuple[str, ...]


def misfits() -> list[Misfit]:
    """Compare the pins of every trainer that is installed, and what is known to break it, with what is here."""
    found = []
    for trainer in TRAINERS.values():
        version = _installed(trainer.distribution)
        problems = _problems(trainer) if version else ()
        if version and problems and trainer.install:
            found.append(Misfit(trainer.distribution, version, problems, (*trainer.install, *trainer.packed_install)))
    return found


def _problems(trainer: Trainer) -> tuple[str, ...]:
    problems = []
    for line in metadata.requires(trainer.distribution) or ():
        asked = Requirement(line)
        if asked.marker is None or asked.marker.evaluate({"extra": ""}):
            here = _installed(asked.name)
            if here and not asked.specifier.contains(here, prereleases=True):
                problems.append(f"asks for {asked.name}{asked.specifier}, {here} is installed")
    for line, harm in trainer.breaks:
        bad = Requirement(line)
        here = _installed(bad.name)
        if here and bad.specifier.contains(here, prereleases=True):
            problems.append(f"{bad.name} {here} is installed: {harm}")
    return tuple(problems)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name) if name else None
    except metadata.PackageNotFoundError:
        return None
