import sys

import pytest
import torch

from qinit.grids.integer import kernels
from qinit.machine import CPU


@pytest.mark.parametrize(("device", "triton", "expected"), [("cpu", True, "numba"), ("cuda", False, "torch")])
def test_a_device_gets_what_runs_on_it(device, triton, expected, monkeypatch):
    monkeypatch.setattr(kernels, "find_spec", lambda name: object() if triton else None)
    assert kernels.kernels_for(torch.device(device)) is getattr(kernels, f"_of_{expected}")()


def test_a_gpu_takes_triton_where_it_is_there():
    pytest.importorskip("triton")
    found = kernels.kernels_for(torch.device("cuda"))
    assert {found.quantize.__module__, found.descend_block.__module__, found.feed_back_block.__module__} == {
        "qinit.grids.integer.search_triton",
        "qinit.grids.integer.rounding_triton",
    }
    assert kernels.kernels_for(CPU) is not found


def test_a_cpu_needs_no_triton():
    kernels.kernels_for(CPU)
    assert "qinit.grids.integer.search_cpu" in sys.modules
