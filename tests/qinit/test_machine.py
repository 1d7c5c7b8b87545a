import os
import platform
from pathlib import Path

import pytest
import torch

from qinit.errors import RecipeError
from qinit.machine import free_memory, peak_memory_bytes, pick_device, processor, ran_on, versions


def test_it_names_the_processor_and_the_cores_and_no_host():
    found = ran_on()
    assert set(found) == {"cpu", "cores", "gpu"}
    assert found["cores"] >= 1
    assert platform.node() not in str(found["cpu"])


def test_auto_and_cpu_are_always_there():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda")


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:300", "cuda:99999999999999999999"])
def test_a_device_that_is_not_there_is_an_error(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match=f"no '{name}' here, torch sees 0 CUDA devices; use --device cpu"):
        pick_device(name)


def test_the_named_device_is_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    assert pick_device("cuda") == torch.device("cuda", 0)
    with pytest.raises(RecipeError, match="torch sees 2"):
        pick_device("cuda:2")


def test_versions_name_what_can_change_a_byte():
    import torch

    found = versions()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(found) >= {"python", "qinit", "numpy", "numba", "transformers", "peft"}


def test_peak_memory_is_in_bytes():
    before = peak_memory_bytes()
    block = bytearray(200 << 20)
    block[::4096] = b"x" * len(block[::4096])
    assert peak_memory_bytes() >= max(before, 200 << 20)


def test_the_processor_has_a_name():
    assert ", " in processor()


def test_this_machine_has_memory():
    unused = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0.8 * unused < free_memory(torch.device("cpu")) < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_what_the_system_caches_of_files_counts_as_free(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "MemTotal: 90 kB\nMemFree: 5 kB\nMemAvailable:   70 kB\n")
    assert free_memory(torch.device("cpu")) == 70 * 1024
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "nothing\n")
    assert free_memory(torch.device("cpu")) > 1e6


def test_processes_of_one_machine_have_a_part_of_what_is_free_each(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "MemAvailable:       80 kB\n")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(torch.device("cpu")) == 20 * 1024


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_takes_the_gpu_of_its_number(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device(name) == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
