import json
import math
from collections import Counter

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from qinit.errors import CheckpointError, TargetError
from qinit.source.checkpoint import Checkpoint
from qinit.source.targets import ALL_LINEAR, quantizable, read_architecture, resolve_targets, select
from qinit.source.vocabulary import Facts
from tests.fuzz import examples, json_values, numbers, only_qinit_errors, with_value
from tests.helpers import edit_config
from tests.models import FAMILIES, make_checkpoint

LLAMA_KINDS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def targets_of(directory):
    checkpoint = Checkpoint.open(directory)
    return resolve_targets(checkpoint, read_architecture(checkpoint))


def kinds(targets):
    return {target.name.rsplit(".", 1)[-1] for target in targets}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_a_family_is_a_target_but_embeddings_and_heads(tmp_path, family):
    directory = make_checkpoint(tmp_path / family, family)
    matrices = {name for name, tensor in Checkpoint.open(directory).tensors.items() if len(tensor.shape) == 2}
    others = {"embed_tokens", "embed_positions", "lm_head", "wte", "wpe"}
    expected = {name for name in matrices if name.split(".")[-2] not in others}
    assert {target.tensor.name for target in targets_of(directory)} == expected
    assert len(expected) >= 8


def test_conv1d_is_known_as_transposed(tmp_path):
    target = targets_of(make_checkpoint(tmp_path / "gpt2", "gpt2"))[0]
    assert target.module.transposed
    assert target.tensor.shape == (64, 192)
    assert (target.module.out_features, target.module.in_features) == (192, 64)


def test_a_head_tied_to_the_embedding_is_no_target_even_when_it_is_stored(tmp_path):
    directory = make_checkpoint(tmp_path / "m", tie_word_embeddings=True)
    assert "lm_head.weight" not in Checkpoint.open(directory).tensors
    assert kinds(targets_of(directory)) == LLAMA_KINDS


def test_a_base_model_checkpoint_resolves(tmp_path):
    directory = make_checkpoint(tmp_path / "m", "gpt2", model_class="GPT2Model")
    targets = targets_of(directory)
    assert targets[0].tensor.name == targets[0].name + ".weight" == "h.0.attn.c_attn.weight"


def test_tensors_without_the_base_prefix_resolve_for_a_model_with_a_head(tmp_path):
    directory = make_checkpoint(tmp_path / "m", "gpt2", model_class="GPT2Model")
    edit_config(directory, architectures=["GPT2LMHeadModel"])  # as the `gpt2` of the Hub is stored
    target = targets_of(directory)[0]
    assert target.name == "transformer.h.0.attn.c_attn"
    assert target.prefix == "h.0.attn.c_attn."


def test_tensors_with_the_base_prefix_resolve_for_a_base_model(tmp_path):
    directory = make_checkpoint(tmp_path / "m", "gpt2")
    edit_config(directory, architectures=["GPT2Model"])
    target = targets_of(directory)[0]
    assert (target.name, target.prefix) == ("h.0.attn.c_attn", "transformer.h.0.attn.c_attn.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "nosuchtype"}, "'nosuchtype'"),
        ({"model_type": None}, "does not know this model"),
        ({"hidden_size": "wide"}, "config.json"),
        ({"hidden_size": -64}, "config.json"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"hidden_size": 128}, "config and weights belong to different models"),
        ({"num_hidden_layers": 3}, r"no weight for module 'model\.layers\.2"),
    ],
)
def test_a_configuration_that_fits_no_model_is_an_error(tiny_llama, changes, message):
    edit_config(tiny_llama, **changes)
    with pytest.raises(CheckpointError, match=message):
        targets_of(tiny_llama)


def test_a_weight_of_a_type_that_is_not_read_is_an_error(tiny_llama):
    file = tiny_llama / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    safetensors.torch.save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, file)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight' is torch\.float8_e4m3fn"):
        targets_of(tiny_llama)


@pytest.mark.parametrize(
    ("wanted", "exclude", "expected"),
    [
        (ALL_LINEAR, None, LLAMA_KINDS),
        ("q_proj,v_proj", None, {"q_proj", "v_proj"}),
        (" q_proj , mlp.down_proj ", None, {"q_proj", "down_proj"}),
        (r".*\.mlp\.\w+", None, {"gate_proj", "up_proj", "down_proj"}),
        (ALL_LINEAR, "o_proj,down_proj", LLAMA_KINDS - {"o_proj", "down_proj"}),
        (ALL_LINEAR, r".*(q|k|v)_proj", LLAMA_KINDS - {"q_proj", "k_proj", "v_proj"}),
    ],
)
def test_selection_by_name_ending_and_by_expression(tiny_llama, wanted, exclude, expected):
    chosen = select(targets_of(tiny_llama), wanted, exclude)
    assert kinds(chosen) == expected
    assert len(chosen) == 2 * len(expected)


def test_selection_keeps_the_models_order_and_can_name_one_module(tiny_llama):
    targets = targets_of(tiny_llama)
    assert select(targets, "v_proj,q_proj") == tuple(t for t in targets if t.name.endswith(("q_proj", "v_proj")))
    assert [t.name for t in select(targets, "model.layers.1.mlp.up_proj")] == ["model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize(
    ("wanted", "exclude", "expected"),
    [
        ("experts", None, {"gate_up_proj": 8, "down_proj": 8}),
        ("experts.down_proj,q_proj", None, {"q_proj": 2, "down_proj": 8}),
        ("gate_up_proj", r".*\[[0-2]\]", {"gate_up_proj": 2}),
        (r"model\.layers\.0\.mlp\.experts\.down_proj\[3\]", None, {"down_proj": 1}),
        (ALL_LINEAR, "experts,k_proj,v_proj,o_proj", {"q_proj": 2}),
    ],
)
def test_experts_go_by_their_parameter_its_module_and_their_number(tmp_path, wanted, exclude, expected):
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "m", "qwen3_moe"))
    chosen = select(quantizable(checkpoint, read_architecture(checkpoint)), wanted, exclude)
    assert Counter(target.name.rsplit(".", 1)[-1].split("[")[0] for target in chosen) == expected


def test_routers_are_no_targets(tmp_path):
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "m", "llama4"))
    targets = quantizable(checkpoint, read_architecture(checkpoint))
    assert not any("router" in target.name for target in targets)
    with pytest.raises(TargetError, match=r"no linear module is named 'router'.*experts.gate_up_proj \(8x\)"):
        select(targets, "router")


@pytest.mark.parametrize(
    ("wanted", "exclude", "message"),
    [
        ("q_prj", None, r"'q_prj' \(did you mean 'q_proj'\?\); the model has .*q_proj \(2x\)"),
        ("q_proj,proj", None, "no linear module is named 'proj'"),
        (ALL_LINEAR, "q_prjo", r"--exclude: .*did you mean 'q_proj'"),
        (r".*\.attention\..*", None, r"matches no whole module name \(one is 'model\.layers\.0"),
        ("(", None, "no valid regular expression"),
        ("q_proj", "q_proj", "no linear module is left"),
        ("q_proj", ".*", "no linear module is left"),
        (",", None, "no linear module is left"),
    ],
)
def test_a_choice_that_matches_nothing_says_what_there_is(tiny_llama, wanted, exclude, message):
    with pytest.raises(TargetError, match=message):
        select(targets_of(tiny_llama), wanted, exclude)


@pytest.fixture(scope="module")
def changing(tmp_path_factory):
    """A model whose config.json tests replace, and what it was."""
    directory = make_checkpoint(tmp_path_factory.mktemp("changing") / "llama")
    return directory, json.loads((directory / "config.json").read_text())


def plan_with(directory, config):
    """Read what a plan reads of a configuration, and what a calibration reads beside it."""
    (directory / "config.json").write_text(json.dumps(config))
    with only_qinit_errors():
        checkpoint = Checkpoint.open(directory)
        architecture = read_architecture(checkpoint)
        for target in resolve_targets(checkpoint, architecture):
            assert math.prod(target.tensor.shape) == target.module.out_features * target.module.in_features > 0
        facts = Facts.read(directory, checkpoint.config)
        facts.clip(8)
        facts.require_vocabulary()
        facts.require_start()


@examples(20)
@given(st.integers(0, 10**4), json_values)
def test_fuzz_a_configuration_with_a_value_replaced_is_read_or_refused(changing, path, value):
    directory, config = changing
    plan_with(directory, with_value(config, path, value))


@examples(20)
@given(st.data())
def test_fuzz_a_configuration_with_another_number_is_read_or_refused(changing, data):
    directory, config = changing
    sizes = [name for name, value in config.items() if type(value) in (int, float)]
    names = data.draw(st.lists(st.sampled_from([*sizes, "num_labels", "head_dim", "depth", "n_layer"]), max_size=2))
    plan_with(directory, config | {name: data.draw(numbers) for name in names})
