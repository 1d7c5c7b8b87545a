import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qinit.stream import stored
from qinit.stream.stored import can_be_held, computing_in_float32
from tests.helpers import gauss

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def all_are_large(monkeypatch):
    monkeypatch.setattr(stored, "LARGE", 1)
    monkeypatch.setattr(stored, "ROWS", 16)


def halved(module, dtype=torch.bfloat16):
    """The module with its weight in 16 bits, and one that holds the same numbers in float32."""
    short = copy.deepcopy(module)
    short.weight = nn.Parameter(module.weight.data.to(dtype), requires_grad=False)
    long = copy.deepcopy(module)
    long.weight = nn.Parameter(short.weight.data.float(), requires_grad=False)
    return short, long


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_embedding_gives_what_it_gives_in_float32(dtype):
    short, long = halved(nn.Embedding(40, 8, padding_idx=0), dtype)
    ids = torch.tensor([[0, 3, 39], [7, 7, 1]])
    with computing_in_float32(short, CPU):
        found = short(ids)
    assert found.dtype == torch.float32
    assert torch.equal(found, long(ids))
    assert short(ids).dtype == dtype


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [7, 16, 50])
def test_a_head_gives_what_it_gives_in_float32_and_its_gradient(rows, bias):
    short, long = halved(nn.Linear(12, rows, bias=bias))
    inputs = [gauss(2, 5, 12).requires_grad_() for _ in range(2)]
    with computing_in_float32(short, CPU):
        outputs = [short(inputs[0]), long(inputs[1])]
        for output in outputs:
            (output * gauss(2, 5, rows, seed=1)).sum().backward()
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-5)


def test_others_are_left_as_they_are(monkeypatch):
    class Scaled(nn.Embedding):
        pass

    assert can_be_held(nn.Linear(4, 4))
    assert not can_be_held(Scaled(4, 4))
    assert not can_be_held(nn.Embedding(4, 4, max_norm=1.0))
    assert not can_be_held(nn.LayerNorm(4))
    monkeypatch.setattr(stored, "LARGE", 17)
    assert not can_be_held(nn.Linear(4, 4))
    meta = nn.Linear(8, 8, device="meta", dtype=torch.bfloat16)
    with computing_in_float32(meta, CPU):
        assert "forward" not in vars(meta)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_computes_in_float32_and_says_so(tied):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 50}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)).eval()
    tokens, names = torch.arange(12)[None], list(model.state_dict())
    for module in (model.model.embed_tokens, model.lm_head):
        module.weight.data = module.weight.data.bfloat16()
    short = {name: value.float() for name, value in model.state_dict().items()}
    with computing_in_float32(model, CPU), torch.no_grad():
        assert model.dtype == model.model.dtype == torch.float32
        found = model(input_ids=tokens).logits
    assert model.dtype == torch.bfloat16
    assert list(model.state_dict()) == names
    for module in (model.model.embed_tokens, model.lm_head):
        module.weight.data = module.weight.data.float()
    model.load_state_dict(short)
    with torch.no_grad():
        torch.testing.assert_close(found, model(input_ids=tokens).logits, rtol=1e-6, atol=1e-6)


def test_all_is_as_before_after_an_error():
    model, seen = nn.Linear(4, 4, dtype=torch.bfloat16), []

    def broken():
        with computing_in_float32(model, CPU):
            seen.append("forward" in vars(model))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert seen == [True]
    assert "forward" not in vars(model)
