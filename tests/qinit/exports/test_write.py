import json

import pytest

from qinit.errors import OutputError, RecipeError, ReportError
from qinit.exports import FinishedRun
from qinit.exports.write import export
from qinit.hub.prepare import prepare
from qinit.report.report import Exported, Report
from qinit.verification.findings import Finding
from qinit.verification.verify import verify
from tests.helpers import quantize
from tests.models import make_checkpoint


def test_what_does_not_work_leaves_nothing(tmp_path, monkeypatch):
    quantize(make_checkpoint(tmp_path / "source"), tmp_path / "run", format="dense")
    run = FinishedRun.open(tmp_path / "run")
    with pytest.raises(RecipeError, match=r"--to: no 'dens' \(did you mean 'dense'\?\); known are dense"):
        export(run, "dens", tmp_path / "out")
    with pytest.raises(OutputError, match="exists; choose another place"):
        export(run, "dense", tmp_path / "run")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qinit.exports.checkpoint.SafetensorsWriter.write_chunks", full)
    with pytest.raises(OutputError, match="No space left on device"):
        export(run, "dense", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "source"]


def test_an_export_says_what_it_is_and_is_verified_and_pushed_as_that(tmp_path):
    quantize(make_checkpoint(tmp_path / "source"), tmp_path / "run")
    out = tmp_path / "out"
    lost = export(FinishedRun.open(tmp_path / "run"), "dense", out, requantize=True)
    assert Report.read(out).export == Exported("dense", "transformers", trained=False, lost=lost)
    assert Report.read(out).layers == Report.read(tmp_path / "run").layers
    with pytest.raises(ReportError, match=r"is an export \(dense\); give the run"):
        FinishedRun.open(out)

    assert not [event for event in verify(out) if isinstance(event, Finding)]

    card = (out / "README.md").read_text()
    assert f"does not hold all of the run: {lost}." in card
    assert 'subfolder="eqft_init"' in card
    prepared = prepare(out, "me/tiny")
    assert prepared.rewritten["README.md"].decode().count("hf download me/tiny --local-dir tiny && cd tiny") == 1
    assert json.loads(prepared.rewritten["eqft_init/adapter_config.json"])["base_model_name_or_path"] == "me/tiny"
    assert prepared.left_out == ()
    with pytest.raises(ReportError, match="is an export; make one of its run"):
        prepare(out, "me/tiny", tmp_path / "run/eqft_init")

    (out / "config.json").write_text("{}")
    found = [str(each) for each in verify(out) if isinstance(each, Finding) and each.grave]
    assert found[0].startswith("config.json: has changed")
    with pytest.raises(ReportError, match=r"config\.json: is not what the run wrote"):
        prepare(out, "me/tiny")
