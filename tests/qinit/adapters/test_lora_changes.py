import shutil
from pathlib import Path

import pytest
import torch

from qinit.errors import CheckpointError
from qinit.merge.plan import plan_merge
from tests.helpers import edit_json, edit_tensors

# tests/qinit/merge/test_run.py compares every kind that is taken with PEFT's own merge.
UP = "base_model.model.model.layers.1.mlp.up_proj"


@pytest.fixture
def adapter(finished, tmp_path):
    return Path(shutil.copytree(finished / "eqft_init", tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_qalora": True}, "use_qalora is more than what a merge adds"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is more"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is more"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights is 'pissa_niter_4', with which PEFT changes the base",
        ),
        ({"init_lora_weights": "olora"}, "save it as ordinary LoRA first"),
        ({"use_dora": True}, "has no lora_magnitude_vector, though use_dora is set"),
        ({"peft_type": "LOHA"}, "an adapter of peft_type 'LOHA' is not read"),
    ],
)
def test_options_that_are_more_than_a_merge_are_refused_by_name(finished, adapter, settings, words):
    edit_json(adapter / "adapter_config.json", lambda config: config.update(settings))
    with pytest.raises(CheckpointError, match=f"adapter: .*{words}"):
        plan_merge(finished, adapter)


def test_what_peft_does_not_know_it_passes_over_and_so_does_a_merge(finished, adapter):
    edit_json(adapter / "adapter_config.json", lambda config: config.update(unsloth_fixed=True))
    assert plan_merge(finished, adapter).layout.steps


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("base_model.model.model.norm.extra", (64,), "'model.norm.extra' is no parameter of the model"),
        (
            f"{UP}.lora_A.weight",
            (4, 64, 1, 1),
            "is Linear; a merge takes linear layers, embeddings and stacked experts",
        ),
        ("base_model.model.model.norm.lora_A.weight", (4, 64), "model.norm has one of its two factors"),
        ("base_model.model.model.layers.7.mlp.up_proj.lora_A.weight", (4, 64), "up_proj is no module of the base"),
        ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", (2, 64), "which rows of"),
    ],
)
def test_tensors_of_other_kinds_are_refused_by_name(finished, adapter, name, shape, words):
    edit_tensors(adapter / "adapter_model.safetensors", lambda tensors: tensors.update({name: torch.ones(shape)}))
    with pytest.raises(CheckpointError, match=f"cannot be merged: .*{words}"):
        plan_merge(finished, adapter)
