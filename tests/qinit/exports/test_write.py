import pytest

from qinit.errors import OutputError, RecipeError
from qinit.exports import FinishedRun
from qinit.exports.write import export
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

    monkeypatch.setattr("qinit.exports.dense.SafetensorsWriter.write_chunks", full)
    with pytest.raises(OutputError, match="No space left on device"):
        export(run, "dense", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "source"]
