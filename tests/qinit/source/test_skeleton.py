import pytest

from qinit.errors import CheckpointError
from qinit.source.checkpoint import Checkpoint
from qinit.source.targets import read_architecture
from tests.helpers import edit_config
from tests.qinit.source.test_targets import targets_of


@pytest.mark.parametrize("architectures", [None, ["NotAClass"], ["PretrainedConfig"]])
def test_without_a_known_class_the_causal_model_of_the_type_is_taken(tiny_llama, architectures):
    edit_config(tiny_llama, architectures=architectures)
    architecture = read_architecture(Checkpoint.open(tiny_llama))
    assert architecture.class_name == "LlamaForCausalLM"


def test_building_the_architecture_takes_no_memory_for_weights(tiny_llama):
    edit_config(tiny_llama, hidden_size=1 << 20, intermediate_size=1 << 22)  # some 40 TB of weights
    architecture = read_architecture(Checkpoint.open(tiny_llama))
    assert architecture.linear[-1].in_features == 1 << 22


def test_code_in_a_checkpoint_is_never_run_nor_asked_about(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: "y")
    (tiny_llama / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    edit_config(tiny_llama, model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})
    with pytest.raises(CheckpointError, match="needs code that the checkpoint brings"):
        targets_of(tiny_llama)
    assert not (tmp_path / "ran").exists()


def test_more_modules_than_the_tensors_can_be_of_are_not_built(tiny_llama, monkeypatch):
    monkeypatch.setattr("qinit.source.skeleton.FEW_MODULES", 20)
    monkeypatch.setattr("qinit.source.skeleton.MODULES_PER_TENSOR", 1)
    with pytest.raises(CheckpointError, match="describes more than 21 modules, but the checkpoint holds 21 tensors"):
        targets_of(tiny_llama)


def test_the_bounds_leave_no_hook_behind(tiny_llama):
    from torch.nn.modules import module

    targets_of(tiny_llama)
    assert not module._global_module_registration_hooks
    assert not module._global_buffer_registration_hooks
