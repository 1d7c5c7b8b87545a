import json

import pytest

from qinit.errors import CheckpointError
from qinit.servers.stored import StoredBase
from tests.helpers import quantize
from tests.models import make_checkpoint


def stored(directory, **config):
    (directory / "config.json").write_text(json.dumps(config))
    return StoredBase.of(directory)


def test_runs_of_one_width_of_several_and_unpacked(finished, tmp_path):
    assert StoredBase.of(finished) == StoredBase("dense")
    source = make_checkpoint(tmp_path / "source")
    quantize(source, tmp_path / "one", bits=3)
    one = StoredBase.of(tmp_path / "one")
    assert (one.form, one.grids, one.mixed) == ("gptq", {(3, 64, True)}, False)
    quantize(source, tmp_path / "two", ratio=0.5, allocation="first", format="gptq")
    two = StoredBase.of(tmp_path / "two")
    assert (two.grids, two.mixed) == ({(2, 64, True), (3, 64, True)}, True)


def test_forms_of_other_programs(tmp_path):
    weights = {"num_bits": 2, "group_size": 64, "symmetric": True}
    groups = {"a": {"targets": ["re:.*q_proj$"], "weights": weights}, "b": {"targets": ["Linear"], "weights": weights}}
    found = stored(tmp_path, quantization_config={"quant_method": "compressed-tensors", "config_groups": groups})
    assert (found.form, found.grids) == ("compressed-tensors", {(2, 64, False)})
    extra = {"model.layers.0.mlp.up_proj": {"bits": 4}, "lm_head": {"bits": 16}}
    own = {"quant_method": "auto-round", "bits": 2, "group_size": 64, "sym": True, "extra_config": extra}
    assert stored(tmp_path, quantization_config=own).grids == {(2, 64, False), (4, 64, False)}
    own = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert stored(tmp_path, quantization_config=own).grids == {(4, None, True)}
    mlx = stored(tmp_path, quantization={"group_size": 64, "bits": 4, "model.layers.0": {"group_size": 32, "bits": 8}})
    assert (mlx.form, mlx.grids) == ("mlx", {(4, 64, True), (8, 32, True)})
    (tmp_path / "model.gguf").write_bytes(b"")
    assert StoredBase.of(tmp_path).form == "gguf"


def test_a_directory_of_no_model_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: not found; a model's directory has one"):
        StoredBase.of(tmp_path)
