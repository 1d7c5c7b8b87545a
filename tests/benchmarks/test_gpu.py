"""benchmarks/gpu.py is rehearsed here, so that nobody who has a GPU for some minutes meets its faults."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    yield gpu
    for name in ("gpu", "common", "tables"):
        sys.modules.pop(name, None)


def test_every_part_but_those_for_a_card_runs_on_a_cpu(gpu, tmp_path):
    setting = gpu.Setting(torch.device("cpu"), {**gpu.TINY, "vocab_size": 64}, 2, 16, tmp_path)
    gpu.make_model(setting.source, setting.model, setting.device)
    parts = {name: gpu.PARTS[name](setting) for name in ("layers", "without data", "calibrated", "own text")}
    assert parts["layers"]["512 x 256"] > 0
    for name in ("without data", "calibrated"):
        assert parts[name]["4 blocks"] > 0
        assert parts[name]["split"]["solving"] > 0
    (table,) = gpu.conclude.__globals__["KINDS"]["gpu"](
        {"model": "tiny", "device": "cpu", "machine": {"gpu": None}, **parts}
    )
    assert ["layers", "512 x 256"] in [row[:2] for row in table.rows]


def test_the_script_needs_nothing_installed_but_finds_the_packages():
    found = subprocess.run(
        ["bash", "benchmarks/gpu.sh", "--help"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert "--tiny" in found.stdout
