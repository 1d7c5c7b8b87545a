"""The examples of docs/extend work as they stand there."""

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qinit.adapters import ADAPTERS
from qinit.adapters.reading import SavedAdapter
from qinit.exports import EXPORTS, FinishedRun
from qinit.exports.write import export
from qinit.formats import FORMATS
from qinit.grids import GRIDS
from qinit.solver.methods import CALIBRATED, METHODS, Method
from qinit.stages import STAGES
from qinit.verification.findings import Finding
from qinit.verification.verify import verify
from tests.models import make_checkpoint
from tests.stock import dense_weight, load, load_base, lora_modules, quantize, solved

CPU = torch.device("cpu")
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
        (row,) = eval(code, {"Method": Method, "CALIBRATED": CALIBRATED, "replace": replace})
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


def test_an_adapter(tmp_path, monkeypatch, module, register):
    code, registry, row = examples("adapter.md")
    kind = module(code, "adalora").AdaLoraAdapter()
    assert "AdaLoraAdapter()" in registry
    monkeypatch.setitem(ADAPTERS, kind.name, kind)
    source = make_checkpoint(tmp_path / "source", dtype="float32")
    plan, _ = quantize(source, tmp_path / "out", method=register(row), format="dense")
    saved = SavedAdapter.open(tmp_path / "out/eqft_init")
    model = load(tmp_path / "out")
    solutions = solved(plan)
    for name, layer in lora_modules(model).items():
        torch.testing.assert_close(saved.change(name, CPU), layer.get_delta_weight("default"))
        torch.testing.assert_close(saved.change(name, CPU), solutions[name][2], rtol=1e-4, atol=1e-5)
    assert not [finding for finding in verify(tmp_path / "out", source) if isinstance(finding, Finding)]


def test_an_export(tmp_path, monkeypatch, module):
    import numpy as np

    code, registry = examples("export.md")
    form = module(code, "numpy_archive").NumpyArchive()
    assert "NumpyArchive()" in registry
    monkeypatch.setitem(EXPORTS, form.name, form)
    quantize(make_checkpoint(tmp_path / "source", "gpt2", "float32"), tmp_path / "run", format="dense")
    export(FinishedRun.open(tmp_path / "run"), "npz", tmp_path / "out")
    found = np.load(tmp_path / "out/model.npz")
    for name, layer in lora_modules(load(tmp_path / "run")).items():
        weight = layer.base_layer.weight + layer.get_delta_weight("default")
        torch.testing.assert_close(torch.from_numpy(found[f"{name}.weight"]), weight.detach())


def test_a_stage(tmp_path, monkeypatch, module, register):
    code, registry, row = examples("stage.md")
    stage = module(code, "scaled").Scaled()
    assert "Scaled()" in registry
    monkeypatch.setitem(STAGES, stage.name, stage)
    source = make_checkpoint(tmp_path / "source", dtype="float32", initializer_range=0.1)
    few = {"calibration": "random", "calibration_samples": 8, "calibration_length": 16, "format": "dense"}
    _, plain = quantize(source, tmp_path / "plain", method="eqft", iter=None, **few)
    chosen = []
    real = stage.improved
    monkeypatch.setattr(stage, "improved", lambda *given: chosen.append(real(*given)) or chosen[-1])
    _, report = quantize(source, tmp_path / "out", method=register(row), iter=None, **few)
    assert [len(layers) for layers in chosen] == [7, 7]
    assert all(layer.output_error is None for layer in report.layers)  # what they are off by was measured before
    modules = lora_modules(load(tmp_path / "out"))
    for layers in chosen:
        for name, low_rank in layers.items():
            torch.testing.assert_close(modules[name].get_delta_weight("default"), low_rank.B @ low_rank.A)
    assert plain.layers[0].output_error is not None
