import pytest
import torch

from qinit.loading import load_base
from qinit.stream.calls import NotStreamable
from qinit.trial.deep import compare_blocks
from qinit.trial.names import on_meta, put_on
from qinit.trial.twin import weights_of
from tests.helpers import quantize
from tests.mixed import gptq_only
from tests.models import ENTANGLED, make_checkpoint
from tests.qinit.trial.test_tried import answers


@pytest.mark.parametrize(("family", "form"), [("llama", "dense"), ("llama", "gptq"), ("gpt2", "dense")])
def test_every_block_is_what_the_files_say(family, form, tmp_path):
    if form == "gptq":
        gptq_only()
    quantize(make_checkpoint(tmp_path / "source", family), tmp_path / "run", format=form)
    problems, notes, done = answers(tmp_path / "run", how="blocks")
    assert (problems, notes) == ([], [])
    assert "and PEFT without weights; 2 blocks, filled from the files, are " in done
    assert done.endswith("how the loaders read values, and what lies outside the blocks, was not compared")


def test_a_scale_that_is_another_one_is_seen_in_every_block_and_its_memory_is_given_back(llama, tmp_path, monkeypatch):
    quantize(llama, tmp_path / "run", format="dense")
    run, adapter = tmp_path / "run", tmp_path / "run/eqft_init"
    model, _ = put_on(load_base(run, "LlamaForCausalLM", {}, dtype=torch.float32, device="meta")[0], adapter)
    monkeypatch.setattr("qinit.adapters.lora.LoraAdapter.scale", lambda *_: 1.5)
    found = [*compare_blocks(model.eval(), weights_of(run, adapter), adapter, run)]
    assert [each.path for each in found] == ["model.layers.0", "model.layers.1"]
    assert all(each.apart > 1e-4 and each.learned == () for each in found)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_rows_of_blocks_are_compared_one_after_the_other(tmp_path):
    quantize(make_checkpoint(tmp_path / "source", "t5"), tmp_path / "run", format="dense")
    problems, notes, done = answers(tmp_path / "run", how="blocks")
    assert (problems, notes) == ([], [])
    assert done.startswith("loaded by T5ForConditionalGeneration and PEFT without weights; 4 blocks, ")


def test_what_is_no_row_of_blocks_is_said_to_be_none(tmp_path):
    quantize(make_checkpoint(tmp_path / "source", "gemma4", **ENTANGLED), tmp_path / "run", format="dense")
    run, adapter = tmp_path / "run", tmp_path / "run/eqft_init"
    with pytest.raises(NotStreamable, match="the keys and values of others"):
        next(compare_blocks(put_on(on_meta(run)[0], adapter)[0], weights_of(run, adapter), adapter, run))
    problems, (note,), done = answers(run, how="blocks")
    assert problems == []
    assert "was not compared block by block: some blocks use the keys and values of others" in note
    assert done == "loaded by Gemma4ForCausalLM and PEFT without weights"
