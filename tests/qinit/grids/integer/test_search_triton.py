import subprocess
import sys

import pytest


def test_the_kernel_agrees_with_torch():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.qinit.grids.integer.on_interpreter", "search", "3"]
    subprocess.run(command, check=True)
