import shutil

import pytest
import torch

from qinit.errors import ReportError
from qinit.exports import FinishedRun
from qinit.exports.gguf.reading import read_gguf
from qinit.exports.write import export
from qinit.files.tensors import read_header
from qinit.verification.findings import Checked, Finding
from qinit.verification.verify import verify
from tests.helpers import quantize
from tests.models import make_checkpoint

FORMS = {  # the options of the run, and the part of a layer that is damaged
    "gguf": ({"bits": 2, "symmetric": True, "use_rslora": True}, "blk.1.attn_q.weight"),
    "mlx": ({"bits": 3, "target_modules": "q_proj,up_proj"}, "q_proj.weight"),
    "compressed-tensors": ({"bits": 2, "symmetric": True}, "q_proj.weight_packed"),
    "auto-round": ({"bits": 3, "symmetric": True}, "q_proj.qweight"),
    "dense": ({"bits": 4}, "q_proj.weight"),
    "bnb-nf4": ({"bits": 4, "format": "dense", "method": "qlora"}, "q_proj.weight"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("source") / "llama", dtype="float16")


def findings(*arguments):
    return [str(event) for event in verify(*arguments) if isinstance(event, Finding) and event.grave]


@pytest.mark.parametrize("form", FORMS)
def test_an_export_holds_the_values_of_its_run_and_damage_is_named(form, source, tmp_path):
    options, part = FORMS[form]
    run, out = tmp_path / "run", tmp_path / "out"
    quantize(source, run, group_size=64, **options)
    assert export(FinishedRun.open(run), form, out) is None
    events = list(verify(out, run))
    assert [str(event) for event in events if isinstance(event, Finding)] == []
    layers = {event.name for event in events if isinstance(event, Checked) and event.kind == "layer"}
    assert len(layers) == 14
    assert findings(out) == []

    file = out / ("model.gguf" if form == "gguf" else "model.safetensors")
    stored = read_gguf(file)[1] if form == "gguf" else read_header(file)
    name = part if form == "gguf" else f"model.layers.1.self_attn.{part}"
    with file.open("r+b") as handle:
        handle.seek(stored[name].offset + 6)
        byte = handle.read(1)[0]
        handle.seek(stored[name].offset + 6)
        handle.write(bytes([byte ^ 0x40]))
    changed, value = findings(out, run)
    assert "has changed since it was written" in changed
    assert value.startswith("qinit.json: model.layers.1.self_attn.q_proj.weight: ")
    assert value.endswith("values are not the run's")


def test_what_cannot_be_read_or_belongs_to_another_run_is_named(source, tmp_path):
    quantize(source, tmp_path / "run", bits=4, group_size=64)
    quantize(source, tmp_path / "other", bits=4, group_size=32)
    export(FinishedRun.open(tmp_path / "run"), "dense", tmp_path / "dense")
    assert findings(tmp_path / "dense", tmp_path / "other")[0].startswith("qinit.json: is an export of another run")
    with pytest.raises(ReportError, match="is an export"):
        findings(tmp_path / "dense", tmp_path / "dense")
    shutil.copytree(tmp_path / "dense", tmp_path / "broken")
    (tmp_path / "broken/config.json").write_text("{}")
    assert any("config.json" in each for each in findings(tmp_path / "broken")[1:])
    from tests.helpers import edit_tensors

    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(tmp_path / "dense/model.safetensors", lambda tensors: tensors[name].view(-1)[:1].fill_(torch.nan))
    assert any(f"tensor '{name}' holds 1 NaN" in each for each in findings(tmp_path / "dense"))
