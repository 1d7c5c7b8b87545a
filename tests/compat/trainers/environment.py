"""A trainer's environment: made by its pip commands, kept until they change."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from tests.compat.trainers.table import Row

ROOT = Path(__file__).parents[3]
PLACE = ROOT / "build" / "compat"
TORCH = os.environ.get("TORCH", "torch==2.13.0")
STAMP = "made-by.txt"


def environment(row: Row) -> Path:
    """Return the directory with a row's programs. Raises CalledProcessError where one of its commands fails."""
    # torch goes first and alone, so that nothing else decides which one it is.
    commands = [f"pip install {TORCH}", *row.install]
    directory = PLACE / row.name
    stamp, made_by = directory / STAMP, "\n".join([sys.version, *commands, *row.unfit]) + "\n"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != made_by:
        print(f"making {directory.relative_to(ROOT)}", flush=True)
        venv.create(directory, clear=True, with_pip=True)
        held = directory / "constraints.txt"
        held.write_text(f"{TORCH}\n" if TORCH.startswith("torch=") else "", encoding="utf-8")
        pip = [str(directory / "bin/python"), "-m", "pip", "--disable-pip-version-check"]
        for command in commands:
            print(f"  {command}", flush=True)
            arguments = command.removeprefix("pip install ").split()
            subprocess.run([*pip, "install", "--quiet", "--constraint", str(held), *arguments], check=True)
        if "+cpu" in _torch(directory):
            for path in row.unfit:
                _empty(next(directory.glob("lib/python*/site-packages")) / path)
        stamp.write_text(made_by, encoding="utf-8")
    return directory / "bin"


def _torch(directory: Path) -> str:
    """Return the version of torch that was installed."""
    told = [str(directory / "bin/python"), "-c", "from importlib.metadata import version; print(version('torch'))"]
    return subprocess.run(told, check=True, capture_output=True, text=True).stdout


def _empty(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.is_file():
        path.write_text("")
