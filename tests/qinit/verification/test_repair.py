import pytest

from qinit.files.manifest import write_manifest
from qinit.verification.findings import Checked, Finding
from qinit.verification.verify import verify
from tests.helpers import edit_json, edit_tensors, repair
from tests.others import packed_base


@pytest.fixture
def made(llama, tmp_path):
    repair(llama, packed_base(llama, tmp_path / "base", "bitsandbytes"), tmp_path / "out")
    return tmp_path / "out"


def findings(*arguments):
    events = list(verify(*arguments))
    assert any(isinstance(event, Checked) for event in events)
    return [str(event) for event in events if isinstance(event, Finding)]


def test_a_sound_adapter_is_held_against_base_and_source(llama, made):
    assert findings(made, llama) == []
    assert sum(isinstance(event, Checked) and event.kind == "layer" for event in verify(made, llama)) == 14


@pytest.mark.parametrize(
    ("file", "change", "what"),
    [
        ("adapter_model.safetensors", lambda tensors: [t.mul_(2) for t in tensors.values()], "error against base and"),
        ("adapter_model.safetensors", lambda tensors: tensors.popitem(), "with one of its factors"),
        ("adapter_model.safetensors", lambda tensors: next(iter(tensors.values())).fill_(float("nan")), "NaN or Inf"),
        ("qinit.json", lambda report: report["totals"].update(error=0.5), "totals: error, made anew"),
    ],
)
def test_what_is_not_as_reported_is_named(file, change, what, llama, made):
    (edit_json if file.endswith(".json") else edit_tensors)(made / file, change)
    write_manifest(made)
    assert any(what in each for each in findings(made, llama))
