"""Where a training works: beside its output, under a lock, with what an unfinished one goes on from."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from qinit.errors import OutputError
from qinit.workplace.lock import locked
from qinit.workplace.place import LOCK_NAME, Workplace, partial_of

ASKED_NAME = "asked.json"


@dataclass(frozen=True)
class Place(Workplace):
    """`differs` names what an earlier, unfinished training was asked otherwise, None where there was none."""

    differs: str | None = None

    @property
    def checkpoints(self) -> Path:
        return self.partial / "checkpoints"

    @property
    def last(self) -> str | None:
        """The checkpoint to go on from."""
        return get_last_checkpoint(str(self.checkpoints)) if self.checkpoints.is_dir() else None


def kept(out: Path) -> str:
    """Say what an unfinished training has left beside `out`; an empty string where that is nothing."""
    last = Place(out, partial_of(out)).last
    return f"{Path(last).name} is kept, the same command goes on from there" if last else ""


@contextmanager
def working(out: Path, asked: dict[str, Any], command: str) -> Iterator[Place]:
    """Give a place to work in beside `out`. What an unfinished training was asked alike it goes on with; else it begins
    anew. The place goes when the result is in `out`, or when there is no checkpoint to go on from."""
    partial = partial_of(out)
    try:
        with locked(partial / LOCK_NAME, out, command):
            place = Place(out, partial, _differs(partial / ASKED_NAME, asked))
            if place.differs is not None or not (partial / ASKED_NAME).is_file():
                shutil.rmtree(place.checkpoints, ignore_errors=True)
            (partial / ASKED_NAME).write_text(json.dumps(asked, indent=2), encoding="utf-8")
            shutil.rmtree(place.run, ignore_errors=True)
            try:
                yield place
            except BaseException as error:
                if not place.last:
                    shutil.rmtree(partial, ignore_errors=True)
                elif isinstance(error, Exception):
                    error.add_note(kept(out))
                raise
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise OutputError(
            f"{out}: cannot be written ({error.strerror or error}); {kept(out) or 'nothing was left'}"
        ) from error


def _differs(file: Path, asked: dict[str, Any]) -> str | None:
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    now = json.loads(json.dumps(asked))
    return next((key for key in now if before.get(key) != now[key]), None)


def sum_of(file: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
