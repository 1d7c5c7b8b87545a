"""The examples of docs/extend work as they stand there."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

from qinit.formats import FORMATS
from qinit.grids import GRIDS
from qinit.methods import METHODS, Method
from tests.compat.stock import dense_weight, load, load_base, lora_modules, quantize, solved
from tests.conftest import make_checkpoint

PAGES = Path(__file__).resolve().parents[2] / "docs/extend"


def examples(page):
    """The Python of a page, block by block."""
    return re.findall(r"^```python\n(.*?)^```$", (PAGES / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Return a function that imports an example as the file that it would be."""

    def load_example(code, name):
        file = tmp_path / f"{name}.py"
        file.write_text(code)
        spec = importlib.util.spec_from_file_location(name, file)
        found = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, found)
        spec.loader.exec_module(found)
        return found

    return load_example


@pytest.fixture
def register(monkeypatch):
    """Return a function that puts the row of an example into the method table."""

    def add(code):
        (row,) = eval(code, {"Method": Method})
        monkeypatch.setitem(METHODS, row.name, row)
        return row.name

    return add


def assert_loaded_as_solved(plan, model):
    modules = lora_modules(model)
    for name, (_, q, _) in solved(plan).items():
        torch.testing.assert_close(dense_weight(modules[name].base_layer), q)


def test_a_method(tmp_path, register):
    (row,) = examples("method.md")
    source = make_checkpoint(tmp_path / "source", dtype="float32")
    plan, report = quantize(source, tmp_path / "out", method=register(row), format="dense")
    assert report.totals["error"] < report.totals["error_start"]
    assert_loaded_as_solved(plan, load(tmp_path / "out"))


def test_a_grid(tmp_path, monkeypatch, module, register):
    code, registry, row = examples("grid.md")
    grid = module(code, "uniform").UniformGrid()
    assert "UniformGrid()" in registry
    monkeypatch.setitem(GRIDS, grid.name, grid)
    source = make_checkpoint(tmp_path / "source", dtype="float32")
    plan, report = quantize(source, tmp_path / "out", method=register(row), format="dense", bits=3)
    assert report.totals["error"] < report.totals["error_start"]
    assert_loaded_as_solved(plan, load(tmp_path / "out"))


def test_a_storage_format(tmp_path, monkeypatch, module):
    functional = pytest.importorskip("bitsandbytes.functional")
    code, registry = examples("format.md")
    fmt = module(code, "nf4").Nf4Format()
    assert "Nf4Format()" in registry
    monkeypatch.setitem(FORMATS, fmt.name, fmt)
    source = make_checkpoint(tmp_path / "source", dtype="float32")
    options = {"method": "loftq", "bits": 4, "format": "nf4", "group_size": 64}
    plan, _ = quantize(source, tmp_path / "out", **options)
    model = load_base(tmp_path / "out")
    for name, (_, q, _) in solved(plan).items():
        weight = model.get_submodule(name).weight
        torch.testing.assert_close(functional.dequantize_4bit(weight.data, weight.quant_state).float(), q)
