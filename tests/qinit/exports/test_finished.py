from qinit.exports import FinishedRun
from qinit.exports.write import export
from tests.helpers import quantize
from tests.models import make_checkpoint


def test_another_adapter_takes_the_place_of_the_run_s_own(tmp_path):
    source = make_checkpoint(tmp_path / "source")
    quantize(source, tmp_path / "run", format="dense")
    quantize(source, tmp_path / "other", format="dense", bits=3)
    export(FinishedRun.open(tmp_path / "run", tmp_path / "other/eqft_init"), "dense", tmp_path / "out")
    name = "eqft_init/adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
