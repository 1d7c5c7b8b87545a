import subprocess
import sys

import pytest


def test_the_kernels_agree_with_torch():
    """Those of the search too: a process takes longer to start than to run them."""
    pytest.importorskip("triton")
    subprocess.run([sys.executable, "-m", "tests.qinit.grids.integer.on_interpreter"], check=True)
