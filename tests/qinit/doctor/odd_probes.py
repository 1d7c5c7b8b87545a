"""Probes that end in every way that an engine can end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from qinit.doctor.probes import NothingToTryError, Probe
from qinit.errors import RecipeError


def _prints() -> str:
    print("noise on stdout")
    os.write(1, b"noise from C\n")
    subprocess.run([sys.executable, "-c", "print('noise from a child')"], check=True)
    return f"in {'an empty' if not any(Path.cwd().glob('run*')) else 'a used'} directory"


def _raises() -> str:
    raise ValueError("one\n  two")


def _refuses() -> str:
    raise RecipeError("bits: 5")


def _nothing() -> str:
    raise NothingToTryError("no such device")


def _crashes() -> str:
    os.kill(os.getpid(), signal.SIGSEGV)
    return "alive"


def _exits() -> str:
    print("engine: out of luck", file=sys.stderr)
    os._exit(7)


def _hangs() -> str:
    Path(os.environ["HANGING"]).write_text(str(subprocess.Popen(["sleep", "600"]).pid))
    time.sleep(600)
    return "awake"


PROBES = {
    "prints": Probe("prints", _prints, core=True),
    "raises": Probe("raises", _raises),
    "needs": Probe("needs", _prints, ("no-such-package", "optimum")),
    "crashes": Probe("crashes", _crashes),
    "refuses": Probe("refuses", _refuses),
    "exits": Probe("exits", _exits),
    "hangs": Probe("hangs", _hangs),
    "nothing": Probe("nothing", _nothing),
}
