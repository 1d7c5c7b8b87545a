import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from qinit.formats.gptq.selection import block_to_name, is_replaced, packed, selectors


class Own(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("kind", "replaced"),
    [(nn.Linear, True), (Conv1D, True), (nn.Conv2d, True), (Own, False), (nn.Embedding, False), (nn.Conv3d, False)],
)
def test_nn_linear_itself_is_packed_and_no_subclass(kind, replaced):
    assert is_replaced(kind) == replaced


MODULES = {
    "model": nn.Module,
    "model.layers.0": nn.Module,
    "model.layers.0.mlp.up": nn.Linear,
    "model.layers.0.mlp.down": Own,
    "model.layers.1.mlp.up": nn.Linear,
    "model.layers.1.mlp.0": nn.Linear,
    "model.layers.1.conv": nn.Conv2d,
    "lm_head": nn.Linear,
    "merger.0": nn.Linear,
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"modules_in_block_to_quantize": [[".mlp.up", ".mlp.down"]]},
            {"model.layers.0.mlp.up", "model.layers.1.mlp.up"},
        ),
        ({"modules_in_block_to_quantize": [["0", ".conv"]]}, {"model.layers.1.conv"}),
        ({"modules_in_block_to_quantize": [["0"]], "block_name_to_quantize": "merger"}, set()),
        ({"modules_in_block_to_quantize": [["head"]], "block_name_to_quantize": ""}, {"lm_head"}),
    ],
)
def test_the_loader_packs_by_block_ending_and_class(config, expected):
    assert packed(MODULES, config) == expected


def test_no_block_no_packing():
    assert packed({"blocks.0.up": nn.Linear}, {"modules_in_block_to_quantize": [["up"]]}) == set()


def test_a_name_that_ends_in_a_number_is_named_in_full():
    quantized = ["visual.merger.mlp.0", "visual.blocks.0.mlp.0", "visual.blocks.1.mlp.0"]
    assert selectors(quantized, ["visual.merger.mlp.2"]) == ["visual.merger.mlp.0", ".mlp.0"]
    assert selectors(quantized, ["audio.mlp.0"]) == quantized  # or the ending would catch that too


@pytest.mark.parametrize(
    ("others", "named"),
    [
        ([], None),
        (["model.embed_tokens", "lm_head"], None),
        (["transformer.h.0.up"], "model.layers"),  # which optimum would find first
    ],
)
def test_a_block_is_named_where_the_loader_would_find_another(others, named):
    names = ["model.layers.0.up", "model.layers.1.up"]
    assert block_to_name(names, [*names, *others]) == named


def test_it_is_the_rule_of_optimum():
    pytest.importorskip("optimum")
    pytest.importorskip("gptqmodel")
    import transformers
    from optimum.gptq import GPTQQuantizer

    config = transformers.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    falcon = transformers.FalconForCausalLM(config)
    block = falcon.transformer.h[1]
    block.mlp.dense_4h_to_h = nn.Linear(128, 32)
    block.conv = nn.Conv2d(32, 32, 1)
    block.row = nn.ModuleList([nn.Linear(32, 32), nn.Sequential(nn.Linear(32, 32))])
    block.two = nn.ModuleDict({"2nd": nn.Linear(32, 32), "other": nn.Linear(32, 32)})
    modules = {name: type(module) for name, module in falcon.named_modules() if name}
    chosen = {"modules_in_block_to_quantize": [[".dense_4h_to_h", ".dense", ".conv", "0", "2nd", "other"]]}
    loader = GPTQQuantizer(bits=4, group_size=32, desc_act=False, sym=False, **chosen)
    loader.convert_model(falcon)
    theirs = {name for name, module in falcon.named_modules() if hasattr(module, "qweight")}
    assert packed(modules, chosen) == theirs
    assert {name.removeprefix("transformer.h.1.") for name in theirs} == {"mlp.dense_4h_to_h", "conv", "two.other"}
