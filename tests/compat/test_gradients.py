import pytest
import torch

from tests.models import make_checkpoint
from tests.stock import dense_twin, load, load_adapter, logits, quantize

pytest.importorskip("gptqmodel", reason="pip install 'qinit[gptq]'")
pytest.importorskip("optimum", reason="pip install 'qinit[gptq]'")

TOKENS = torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def source(request, tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp(request.param) / "source", request.param, "float32", **NO_DROPOUT)


NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}  # GPT-2's; Llama has none


@pytest.fixture(scope="module")
def quantized(source, tmp_path_factory):
    directory = tmp_path_factory.mktemp("quantized")
    for bits in (2, 3, 4, 8):
        quantize(source, directory / f"{bits}", bits=bits, format="gptq", lora_alpha=16.0)
    return directory


def lora_gradients(model) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    assert any(gradient.abs().max() > 1e-4 for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()), msg=name)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gradients_through_the_packed_base_are_those_of_the_dense_one(source, quantized, bits):
    directory = quantized / f"{bits}"
    packed = load(directory)
    reference = load_adapter(dense_twin(source, packed, with_adapter=False), directory)
    expected = lora_gradients(reference)
    assert_same_gradients(lora_gradients(packed), expected)
    before = logits(packed)  # an eval forward: kernels may cache or repack there
    assert_same_gradients(lora_gradients(packed), expected)
    torch.testing.assert_close(logits(packed), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_only_the_adapter_is_trained_and_the_loss_falls(quantized, bits):
    model = load(quantized / f"{bits}")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    packed = {name: b.clone() for name, b in model.named_buffers() if "qweight" in name or "scales" in name}
    assert packed
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    model.train()
    for _ in range(8):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(buffer, dict(model.named_buffers())[name]) for name, buffer in packed.items())


def test_gradient_checkpointing_changes_no_gradient(quantized):
    model = load(quantized / "2")
    expected = lora_gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same_gradients(lora_gradients(model), expected)
