"""Stacked experts: found in the model, and in the checkpoint's tensors."""

import pytest
import torch
from safetensors.torch import load_file

from qinit.source.checkpoint import Checkpoint
from qinit.source.targets import expert_targets, read_architecture
from tests.helpers import edit_tensors
from tests.models import make_checkpoint

FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss", "llama4", "granitemoe"]


def opened(directory):
    checkpoint = Checkpoint.open(directory)
    return checkpoint, read_architecture(checkpoint)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_slice_is_found_with_the_values_that_the_model_has(family, tmp_path):
    import transformers

    from tests.models import OTHERS

    source = make_checkpoint(tmp_path / "m", family)
    checkpoint, architecture = opened(source)
    model = getattr(transformers, OTHERS[family][1]).from_pretrained(source, dtype="auto")
    targets = {target.name: target for target in expert_targets(checkpoint, architecture)}
    stacked = {name: p for name, p in model.named_parameters() if p.dim() == 3}
    assert targets.keys() == {f"{name}[{i}]" for name, p in stacked.items() for i in range(len(p))}
    for target in targets.values():
        expected = stacked[target.module.parameter][target.module.expert.index]
        found = torch.cat([tensor.read() for tensor in target.tensors], dim=target.outputs_side)
        assert torch.equal(found, expected)
        sides = (target.module.out_features, target.module.in_features)
        assert tuple(expected.shape) == (sides[::-1] if target.module.transposed else sides)
        hidden = model.config.hidden_size
        assert hidden == (sides[1] if "gate_up" in target.name else sides[0])


def test_what_chooses_among_experts_is_a_router_and_what_they_share_is_none(tmp_path):
    _, architecture = opened(make_checkpoint(tmp_path / "m", "llama4"))
    assert architecture.routers == {f"model.layers.{i}.feed_forward.router" for i in range(2)}
    assert any("shared_expert" in module.name for module in architecture.linear)
    _, architecture = opened(make_checkpoint(tmp_path / "llama"))
    assert not architecture.routers
    assert not architecture.stacks


def test_experts_that_are_called_in_another_way_are_left_with_a_reason(tmp_path):
    checkpoint, architecture = opened(make_checkpoint(tmp_path / "m", "jetmoe"))
    assert {stack.unknown for stack in architecture.stacks} == {
        "its experts are not called with hidden states and a choice of experts"
    }
    assert not expert_targets(checkpoint, architecture)


@pytest.mark.parametrize("change", ["transposed", "missing", "another type"])
def test_tensors_that_are_not_the_slices_leave_them_with_a_reason(change, tmp_path):
    source = make_checkpoint(tmp_path / "m", "qwen3_moe")

    def spoil(tensors):
        name = "model.layers.0.mlp.experts.1.up_proj.weight"
        if change == "transposed":
            tensors[name] = tensors[name].T.contiguous()
        elif change == "missing":
            del tensors[name]
        else:
            tensors[name] = tensors[name].to(torch.float16)

    edit_tensors(source / "model.safetensors", spoil)
    _, architecture = opened(source)
    first, *others = architecture.stacks
    assert first.unknown is not None
    assert not first.sources
    assert all(stack.sources for stack in others)


def test_they_stand_where_the_model_has_them(tmp_path):
    source = make_checkpoint(tmp_path / "m", "qwen3_moe", num_hidden_layers=1)
    _, architecture = opened(source)
    kinds = [name.rsplit(".", 1)[-1].split("[")[0] for name in architecture.modules]
    assert kinds == ["q_proj", "k_proj", "v_proj", "o_proj", *["gate_up_proj"] * 4, *["down_proj"] * 4]
    assert len(load_file(source / "model.safetensors")) > 12
