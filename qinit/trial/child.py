"""A run loaded by stock transformers and PEFT in a process of its own, which answers with a line of JSON for each thing
that it finds: what it loads may be damaged, may print, and may change every package that it imports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from qinit.errors import CheckpointError
from qinit.trial.asked import Answer, Asked
from qinit.trial.tried import tried

CHILD = "import sys; from qinit.trial.child import main; main(sys.argv[1])"
# Nothing is fetched or compiled meanwhile: gptqmodel compiles each layer's dequantize, which takes a minute.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}


def answers(asked: Asked) -> Iterator[Answer]:
    """Start the process and yield what it answers, as it comes. Ends with one of kind `done`, unless the process died,
    which is a finding."""
    with TemporaryDirectory(prefix="qinit-trial-") as place:
        log = Path(place) / "log"
        with log.open("w") as errors:
            child = subprocess.Popen(
                [sys.executable, "-c", CHILD, json.dumps(asdict(asked))],
                cwd=place,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                env={**os.environ, **QUIET},
            )
        try:
            assert child.stdout is not None
            with child.stdout:
                for line in child.stdout:
                    yield Answer(**json.loads(line))
            if child.wait():
                yield Answer("base", f"the process that loads it {_last_words(child.returncode, log)}")
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()


def _last_words(code: int, log: Path) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name} (SIGKILL: memory was short)"
    words = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"ended with {code}" + (f": {words[-1].strip()[:300]}" if words else "")


def main(text: str) -> None:
    """Try what is asked for and write each answer to stdout; what else is printed goes to stderr."""
    told = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    asked = Asked(**json.loads(text))

    try:
        for answer in tried(asked):
            told.write(json.dumps(asdict(answer)) + "\n")
    except CheckpointError as error:
        part = "adapter" if str(error).startswith(asked.adapter) else "base"
        what = str(error).removeprefix(f"{getattr(asked, {'base': 'run'}.get(part, part))}: ")
        told.write(json.dumps(asdict(Answer(part, what))) + "\n")
