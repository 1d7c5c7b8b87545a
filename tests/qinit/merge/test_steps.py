import pytest
import torch

from qinit.adapters.changes import Replaced
from qinit.errors import CheckpointError
from qinit.exports.finished import open_base
from qinit.files.tensors import read_header
from qinit.merge.plan import plan_merge
from qinit.merge.steps import Laying, common_type
from qinit.report.report import Report
from tests.helpers import edit_config, quantize
from tests.models import make_checkpoint, make_float32


def test_every_tensor_has_one_step_and_what_is_as_it_was_is_copied(tmp_path):
    quantize(make_checkpoint(tmp_path / "source"), tmp_path / "run", exclude="q_proj")
    layout = plan_merge(tmp_path / "run").layout
    assert sorted(place.name for step in layout.steps for place in step.places) == sorted(s.name for s in layout.specs)
    changed = {step.name for step in layout.steps if step.changes}
    assert {name.rsplit(".", 2)[1] for name in changed} == {
        *("k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    }
    assert all(step.is_plain for step in layout.steps if step.name not in changed)
    assert (layout.sliced, layout.untied) == (frozenset(), ())


def test_experts_are_steps_of_their_own_one_for_each_matrix(tmp_path):
    quantize(make_float32(tmp_path / "source", "gpt_oss"), tmp_path / "run", format="dense", group_size=32)
    layout = plan_merge(tmp_path / "run").layout
    down = [step for step in layout.steps if step.name.startswith("model.layers.0.mlp.experts.down_proj[")]
    assert [step.places[0].shape for step in down] == [(128, 64)] * 4
    assert {"model.layers.0.mlp.experts.down_proj"} <= layout.sliced


def test_a_packed_layer_gets_the_type_that_its_source_had(tmp_path):
    for dtype in ("float32", "float16"):
        quantize(make_checkpoint(tmp_path / dtype, dtype=dtype), tmp_path / f"{dtype}-run")
        specs = plan_merge(tmp_path / f"{dtype}-run").layout.specs
        assert {spec.dtype for spec in specs} == {getattr(torch, dtype)}
    edit_config(tmp_path / "float16-run", dtype="bfloat16")
    weights, _ = open_base(tmp_path / "float16-run")
    assert common_type(weights) == torch.bfloat16
    edit_config(tmp_path / "float16-run", dtype=None)
    assert common_type(open_base(tmp_path / "float16-run")[0]) == torch.float16


def test_what_no_single_tensor_is_cannot_be_changed(finished):
    weights, architecture = open_base(finished)
    tensor = next(iter(read_header(finished / "eqft_init/adapter_model.safetensors").values()))
    laying = Laying(weights, architecture, Report.read(finished), {"model.gone.weight": [Replaced(tensor)]}, None)
    with pytest.raises(
        CheckpointError, match=r"model\.gone\.weight cannot be merged: no single tensor of the run is it"
    ):
        laying.laid_out([])
    changes = {"model.embed_tokens.weight": [Replaced(tensor)]}
    laying = Laying(weights, architecture, Report.read(finished), changes, None)
    with pytest.raises(CheckpointError, match=r"the model has it as one with encoder\.weight"):
        laying.laid_out([[["model.embed_tokens.weight", "encoder.weight"]]])
