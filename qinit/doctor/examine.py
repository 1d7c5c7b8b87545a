"""What works in this environment, found by trying it: each probe in a child process, with a limit on its time."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from qinit.doctor.probes import Probe
from qinit.requirements import core, package, pip_command

PROBES = "qinit.doctor.probes"
CHILD = "import sys; from qinit.doctor.probes import main; main(*sys.argv[1:])"

LIMIT = 60.0  # seconds for one probe; on two busy cores the slowest takes 15, most of it imports
ALL = 180.0  # seconds after which no other child is started
# Nothing is fetched or compiled meanwhile. gptqmodel compiles each layer's dequantize, which takes a minute.
QUIET = {"HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}


@dataclass(frozen=True)
class Trying:
    """A probe has begun."""

    title: str


@dataclass(frozen=True)
class Row:
    """What came of a probe. `state` is works, fails or absent (there is nothing to try); `detail` is what was seen or
    the reason; `pip` is the command that installs what is missing, or "" where that is not it."""

    name: str
    title: str
    state: str
    core: bool
    seconds: float
    detail: str
    pip: str


def examine(module: str = PROBES, limit: float = LIMIT, total: float = ALL) -> Iterator[Trying | Row]:
    """Try all PROBES of a module, in a temporary directory; `limit` is in seconds, for each of them.

    A child that crashes or hangs is one row, and another child takes over, unless `total` seconds have gone by.
    """
    started = time.monotonic()
    probes: Mapping[str, Probe] = import_module(module).PROBES
    left = []
    for name, probe in probes.items():
        missing = [need for need in _needs(probe) if package(need).installed is None]
        if missing:
            detail = f"{' and '.join(missing)} not installed"
            yield Row(name, probe.title, "absent", probe.core, 0.0, detail, pip_command(missing))
        else:
            left.append(name)
    with TemporaryDirectory(prefix="qinit-doctor-", ignore_cleanup_errors=True) as place:
        while left:
            tried = 0
            for event in _child(module, {name: probes[name] for name in left}, Path(place), limit):
                tried += isinstance(event, Row)
                yield event
            left, spent = left[max(tried, 1) :], time.monotonic() - started
            if spent >= total:
                break
    for name in left:
        yield _row(name, probes[name], "fails", 0.0, f"not tried, as the others took {spent:.0f} s")


def _needs(probe: Probe) -> tuple[str, ...]:
    return (*core(), *probe.needs)


def _child(module: str, probes: Mapping[str, Probe], place: Path, limit: float) -> Iterator[Trying | Row]:
    """Run a child over these probes until it is done, dies or is silent for too long."""
    log = place / "log"
    with log.open("w") as errors:
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, module, *probes],
            cwd=place,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **QUIET},
            start_new_session=True,  # so that what it starts is ended with it
        )
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_forward, args=(child.stdout, lines), daemon=True).start()
    waiting = list(probes)
    try:
        while waiting:
            probe = probes[waiting[0]]
            try:
                line = lines.get(timeout=limit)
            except queue.Empty:
                yield _row(waiting[0], probe, "fails", limit, f"no answer within {limit:g} s")
                return
            if line is None:
                child.wait()
                yield _row(waiting[0], probe, "fails", 0.0, _last_words(child.returncode, log))
                return
            answer = json.loads(line)
            if "state" not in answer:
                yield Trying(probe.title)
                continue
            yield _row(waiting.pop(0), probe, answer["state"], answer["seconds"], answer["detail"])
    finally:
        _end(child)


def _forward(stream: IO[str] | None, lines: queue.SimpleQueue[str | None]) -> None:
    assert stream is not None
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)


def _end(child: subprocess.Popen[str]) -> None:
    if child.poll() is None:
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except (AttributeError, ProcessLookupError):  # Windows has none; or it ended meanwhile
            child.kill()
        child.wait()


def _row(name: str, probe: Probe, state: str, seconds: float, detail: str) -> Row:
    unmet = [need for need in _needs(probe) if not package(need).met] if state == "fails" else []
    if unmet:
        detail += f" (outside of what qinit asks for: {', '.join(unmet)})"
    return Row(name, probe.title, state, probe.core, seconds, detail, pip_command(unmet) if unmet else "")


def _last_words(code: int, log: Path) -> str:
    """Say how a child ended: by which signal, or with which line."""
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    words = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"its process ended with {code}" + (f": {words[-1].strip()[:300]}" if words else "")
