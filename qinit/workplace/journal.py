"""The journal of a run: one line for each thing that is finished, so that the same command can go on after any end.

A line is `SUM JSON`, where SUM is the SHA-256 of the sum before it and of this JSON: what is torn, garbled, left out or
of another run does not fit, and reading ends there. A line about tensors has their checksums, so that it is believed
only as far as they are on the disk, whatever a loss of power has spared.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from qinit.machine import peak_memory_bytes

FORMAT = 1
_START = "qinit journal"  # stands for the sum before the first line
# What each kind of record has at least; reading ends at one that lacks it.
SHAPES: dict[str, dict[str, type]] = {
    "start": {"since": str, "layers": int, "signature": dict, "processor": str, "calibration_reason": str},
    "samples": {"origin": str, "written": bool, "sums": list},
    "sensitivity": {"measured": dict},
    "note": {"text": str},
    "copied": {"name": str, "sums": list},
    "layer": {"row": dict, "sums": list},
    "merged": {"name": str, "sums": list},
    "polish samples": {"origin": str, "written": bool, "sums": list},
    "lessons": {},
    "polishing": {"step": int},
    "ended": {"run": str},
    "polish": {"result": dict, "errors": dict, "sums": dict},
}

Record = dict[str, Any]


class Journal:
    """An open journal. `header` is its first line, `records` are the others: objects with a `kind`, the time that the
    run has taken and the memory that it has needed until then.

    Use `create` or `open`; `close` it at the end.
    """

    def __init__(self, file: Path, records: list[Record], last: str, size: int) -> None:
        self.header, *self.records = records
        self._last = last
        self._before = self.records[-1] if self.records else {}
        self._started = time.perf_counter()
        self._descriptor = os.open(file, os.O_RDWR)
        os.ftruncate(self._descriptor, size)
        os.lseek(self._descriptor, size, os.SEEK_SET)

    @classmethod
    def create(cls, file: Path, header: Record) -> Journal:
        """Start a journal; whatever the file held is gone."""
        header = {"kind": "start", "format": FORMAT, **header}
        line, last = _line(header, _START)
        file.write_bytes(line)
        journal = cls(file, [json.loads(json.dumps(header))], last, len(line))
        os.fsync(journal._descriptor)
        return journal

    @classmethod
    def open(cls, file: Path) -> Journal | None:
        """Open a journal to go on with it: a torn end is cut off. None: there is none, or none that can be trusted."""
        records, last, size = _read(file)
        return cls(file, records, last, size) if records else None

    def append(self, *records: Record, sync: bool = True) -> None:
        """Add records, which then outlive the process; with `sync` the machine too. Raises OSError."""
        lines = b""
        for record in records:
            record |= {"seconds": round(self.seconds, 3), "peak_memory_bytes": self.peak_memory_bytes}
            line, self._last = _line(record, self._last)
            lines += line
        view = memoryview(lines)
        while view:
            view = view[os.write(self._descriptor, view) :]
        self.records += records
        if sync:
            self.sync()

    def sync(self) -> None:
        """Bring to disk what was added."""
        os.fsync(self._descriptor)

    def find(self, kind: str) -> Record | None:
        """Return the last record of a kind."""
        return next((record for record in reversed(self.records) if record["kind"] == kind), None)

    @property
    def seconds(self) -> float:
        """The time that the run has taken so far, in all its parts."""
        return float(self._before.get("seconds", 0)) + time.perf_counter() - self._started

    @property
    def peak_memory_bytes(self) -> int:
        """The most memory that any part of the run has needed so far."""
        return max(int(self._before.get("peak_memory_bytes", 0)), peak_memory_bytes())

    def close(self) -> None:
        os.close(self._descriptor)


def read_journal(file: Path) -> list[Record]:
    """Return what can be trusted of a journal, the header first; nothing where there is none."""
    return _read(file)[0]


def finished_layers(records: list[Record]) -> set[str]:
    """Return the names of the layers that these records say are finished."""
    return {record["row"].get("name") for record in records if record["kind"] == "layer"}


def kept_words(file: Path) -> str:
    """Say what of an unfinished run is worth keeping; nothing (an empty string) where nothing is."""
    records = read_journal(file)
    layers = len(finished_layers(records))
    if layers:
        return f"{layers} of {records[0]['layers']} layers are kept"
    if merged := sum(record["kind"] == "merged" for record in records):
        return f"{merged} of {records[0]['layers']} tensors are kept"
    if any(record["kind"] == "sensitivity" for record in records):
        return "the measured sensitivities are kept"
    if any(record["kind"] == "samples" and record["written"] for record in records):
        return "the text that the model wrote is kept"
    return ""


def _read(file: Path) -> tuple[list[Record], str, int]:
    """Return the records up to the first line that does not fit, the last sum, and where that line starts."""
    records: list[Record] = []
    last, size = _START, 0
    try:
        data = file.read_bytes()
    except OSError:
        return records, last, size
    for line in data.splitlines(keepends=True):
        record = _parsed(line, last)
        if record is None or (record["kind"] == "start") != (not records):
            break
        last = line[:64].decode("ascii")
        size += len(line)
        records.append(record)
    return records, last, size


def _line(record: Record, before: str) -> tuple[bytes, str]:
    text = json.dumps(record)
    digest = hashlib.sha256(f"{before} {text}".encode()).hexdigest()
    return f"{digest} {text}\n".encode(), digest


def _parsed(line: bytes, before: str) -> Record | None:
    digest, _, text = line.partition(b" ")
    if not text.endswith(b"\n"):
        return None
    text = text[:-1]
    if digest != hashlib.sha256(before.encode() + b" " + text).hexdigest().encode():
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return record if _is_record(record) else None


def _is_record(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str) or value["kind"] not in SHAPES:
        return False
    if value["kind"] == "start" and value.get("format") != FORMAT:
        return False
    return all(isinstance(value.get(key), kind) for key, kind in SHAPES[value["kind"]].items())
