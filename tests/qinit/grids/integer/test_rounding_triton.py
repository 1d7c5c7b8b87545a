import subprocess
import sys

import pytest


def test_the_kernels_agree_with_torch():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.qinit.grids.integer.on_interpreter", "rounding", "2"]
    subprocess.run(command, check=True)
