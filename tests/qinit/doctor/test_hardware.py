"""The machine, and the limits of a container."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qinit.doctor.hardware import hardware, hub_cache, memory_limit


def test_what_this_machine_is():
    here = hardware()
    assert here.cpu
    assert here.cores >= 1
    assert {place.what for place in here.disks} == {"current directory", "Hub cache", "temporary files"}
    assert all(place.free > 0 for place in here.disks)
    if Path("/proc/meminfo").exists():
        assert here.memory is not None
        assert here.memory_available is not None
        assert 0 < here.memory_available <= here.memory
        assert here.memory == pytest.approx(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), rel=0.05)


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("memory.max", "2147483648\n", 2 << 30),
        ("memory.max", "max\n", None),
        ("memory/memory.limit_in_bytes", "1073741824\n", 1 << 30),
        ("memory/memory.limit_in_bytes", "9223372036854771712\n", None),
        ("other", "1\n", None),
    ],
)
def test_the_limit_of_a_container(tmp_path, file, text, expected):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    assert memory_limit(tmp_path) == expected


def test_the_cache_is_where_huggingface_hub_has_it(monkeypatch, tmp_path):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub_cache() == tmp_path / ".cache/huggingface/hub"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert hub_cache() == tmp_path / "x/huggingface/hub"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert hub_cache() == tmp_path / "home/hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert hub_cache() == tmp_path / "hub"
