import pytest
import torch
from accelerate import init_empty_weights
from torch import nn

from qinit.source.modules import is_plain, set_by_parents


class ByHand(nn.Linear):
    """Falcon's: the same numbers by another way."""

    def forward(self, x):
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


class Router(nn.Linear):
    """Llama 4's: it gives scores beside the logits."""

    def forward(self, x):
        logits = super().forward(x)
        return logits.sigmoid(), logits


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) / self.in_features**0.5


class Alone(nn.Linear):
    """With no forward of its own."""


class Strict(nn.Linear):
    def forward(self, x):
        raise NotImplementedError


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kind", "plain"),
    [(nn.Linear, True), (Alone, True), (ByHand, True), (Router, False), (Scaled, False), (Strict, False)],
)
def test_a_linear_module_is_plain_if_it_computes_no_more(kind, plain, bias):
    module = kind(64, 32, bias=bias, device="meta")
    assert is_plain(module) == plain
    assert module.weight.is_meta
    assert (module.out_features, module.in_features) == (32, 64)


def names_set(model_class, config_class, **config):
    import transformers

    with init_empty_weights(include_buffers=True):
        model = getattr(transformers, model_class)._from_config(getattr(transformers, config_class)(**config))
    linear = {
        name: module for name, module in model.named_modules() if hasattr(module, "weight") and "norm" not in name
    }
    before = {name: module.weight for name, module in linear.items()}
    found = set_by_parents(model, linear)
    assert {name: module.weight for name, module in linear.items()} == before
    return found


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.mark.parametrize(
    ("model", "config", "among", "not_among"),
    [
        ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 2}, "transformer.h.1.mlp.c_proj", "h.0.mlp.c_fc"),
        # random numbers with bounds, which say nothing of themselves on a tensor without memory
        ("ModernBertForMaskedLM", SMALL, "model.layers.1.attn.Wqkv", "decoder_"),
        # by the class of the whole model
        ("ModernBertForTokenClassification", SMALL, "classifier", "model.layers.0"),
        ("LlamaForCausalLM", SMALL, None, "model.layers.0.mlp.up_proj"),
    ],
)
def test_weights_that_a_parent_initializes_are_found(model, config, among, not_among):
    kind = model.split("For")[0].removesuffix("LMHeadModel") + "Config"
    found = names_set(model, kind, **config)
    assert (among in found) if among else not found
    assert not_among not in found


def test_an_inner_model_initializes_its_own():
    text = {**SMALL, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {**SMALL, "image_size": 16, "patch_size": 8}
    found = names_set("LlavaForConditionalGeneration", "LlavaConfig", **_llava(text, vision))
    assert any("vision_tower" in name for name in found)
    assert not any("language_model" in name for name in found)


def _llava(text, vision):
    import transformers

    return {"text_config": transformers.LlamaConfig(**text), "vision_config": transformers.CLIPVisionConfig(**vision)}


def test_code_that_does_not_run_without_weights_says_nothing():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4, device="meta")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def _init_weights(self, module):
            if isinstance(module, Block):
                module.inner.weight.copy_(torch.zeros(4, 4)[module.inner.weight.argmax().item()])

    model = Model()
    assert set_by_parents(model, {"block.inner": model.block.inner}) == set()
