"""Every start as a user has it: written, loaded by stock transformers and PEFT, compared with the model, trained."""

import json

import pytest
import torch
from safetensors.torch import load_file

from qinit.solver.methods import STARTS
from tests import stock
from tests.helpers import quantize
from tests.models import make_float32

TOKENS = torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(1))
TEXT = {"calibration": "random", "calibration_samples": 6, "calibration_length": 24}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_float32(tmp_path_factory.mktemp("source") / "llama", initializer_range=0.1)


def made(source, out, name, bits, **more):
    """Write a start; return the directories of its base and its adapter."""
    row = STARTS[name]
    options = {"method": name, "bits": bits, "iter": None, "lora_alpha": 12.0, **more}
    options |= TEXT if row.needs else {}
    alone = row.start == "none" and bits == 16
    if bits != 16:
        options |= {"format": "dense", "group_size": 32}
    quantize(source, out, base=str(source) if alone else None, **options)
    return (source, out) if alone else (out, out / stock.ADAPTER)


def loaded(base, adapter):
    from peft import PeftModel

    return PeftModel.from_pretrained(stock.load_base(base), adapter, is_trainable=True)


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("name", STARTS)
def test_a_start_loads_as_it_is_and_trains(name, bits, source, tmp_path):
    base, adapter = made(source, tmp_path / "run", name, bits)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert (config["use_dora"], config["use_rslora"]) == (name == "dora", name == "rslora")
    model = loaded(base, adapter)
    for key, value in load_file(base / "model.safetensors").items():  # nothing is initialized again
        stored = {n.replace(".base_layer", ""): p for n, p in model.get_base_model().named_parameters()}
        assert torch.equal(stored[key], value)
    start, exact = stock.logits(model), stock.logits(stock.load_base(source))
    apart = stock.relative(start, exact)
    assert apart < 1e-5 if bits == 16 else 1e-3 < apart < 0.6
    model.train()
    before = model(input_ids=TOKENS, labels=TOKENS).loss
    before.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    assert any(bool(p.grad.any()) for p in trained)
    torch.optim.SGD(trained, lr=0.1).step()
    assert model(input_ids=TOKENS, labels=TOKENS).loss < before


@pytest.mark.parametrize("name", ["lora", "pissa"])
def test_magnitudes_are_those_of_the_base_with_its_adapter(name, source, tmp_path):
    base, adapter = made(source, tmp_path / "run", name, 4, use_dora=True)
    plain_base, plain_adapter = made(source, tmp_path / "plain", name, 4)
    assert torch.equal(stock.logits(stock.load_base(base)), stock.logits(stock.load_base(plain_base)))
    both = stock.logits(loaded(base, adapter)), stock.logits(loaded(plain_base, plain_adapter))
    assert stock.relative(*both) < 1e-5
