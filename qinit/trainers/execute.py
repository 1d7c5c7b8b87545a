"""Runs what was written for a trainer, where the trainer is installed."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from qinit.errors import RecipeError
from qinit.trainers.write import Written


def require_installed(written: Written) -> None:
    """Raise RecipeError where the trainer is not here: neither its package beside qinit nor its program on the PATH."""
    program = written.command.split()[0]
    if program not in ("python", "sh") and shutil.which(program, path=_path()) is not None:
        return
    try:
        metadata.version(written.distribution)
    except metadata.PackageNotFoundError:
        raise RecipeError(
            f"--execute: {written.title} ({written.distribution}) is not installed here; {written.install}, or leave "
            "--execute out and run what is written where it is"
        ) from None


def execute(written: Written, file: Path) -> int:
    """Run the written file's command in the current directory, on this process's own input and output; returns its
    exit code. This Python is the one that scripts run with, and the programs beside it come first."""
    program, *arguments = shlex.split(written.command_for(file))
    if program == "python":
        program = sys.executable
    environment = {**os.environ, "PATH": _path()}
    found = shutil.which(program, path=_path()) or program
    return subprocess.run([found, *arguments], env=environment, check=False).returncode


def _path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
