import shutil

import pytest

from qinit.errors import CheckpointError
from qinit.exports import FinishedRun
from qinit.exports.write import export
from tests.helpers import edit_json, edit_tensors, quantize
from tests.models import make_checkpoint

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def test_a_trained_adapter_takes_the_place_of_the_run_s_own_and_that_of_another_base_is_refused(tmp_path):
    source, trained = make_checkpoint(tmp_path / "source"), tmp_path / "trained"
    quantize(source, tmp_path / "run", format="dense")
    shutil.copytree(tmp_path / "run/eqft_init", trained)
    edit_tensors(trained / WEIGHTS, lambda tensors: next(iter(tensors.values())).mul_(2))
    opened = FinishedRun.open(tmp_path / "run", trained)
    assert opened.trained
    assert not opened.notes
    export(opened, "dense", tmp_path / "out")
    assert (tmp_path / "out/eqft_init" / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes()
    edit_json(trained / CONFIG, lambda config: config.update(base_model_name_or_path="/gone"))
    assert "names the base '/gone', which is not here" in FinishedRun.open(tmp_path / "run", trained).notes[0]
    quantize(source, tmp_path / "other", format="dense", bits=3)
    with pytest.raises(CheckpointError, match="which is another model"):
        FinishedRun.open(tmp_path / "run", tmp_path / "other/eqft_init")
