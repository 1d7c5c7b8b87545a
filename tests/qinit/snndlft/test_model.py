import json

import pytest
import torch

from qinit.errors import CheckpointError, TargetError
from qinit.snndlft.model import adapt, load
from tests.qinit.snndlft import tiny


@pytest.mark.usefixtures("snn")
def test_a_saved_adapter_loads_with_one_call_and_gives_the_same_logits(tmp_path):
    model, _ = tiny.trained(tiny.config(layer_wise="half"), tmp_path / "run")
    model.save_pretrained(tmp_path / "adapter")
    loaded = load(tmp_path / "adapter", tiny.base())
    assert (tiny.logits(model) - tiny.logits(tiny.base())).abs().max() > 1e-3
    torch.testing.assert_close(tiny.logits(loaded), tiny.logits(model), rtol=0, atol=1e-6)
    ranks = [len(p) for name, p in loaded.named_parameters() if "lora_E" in name]
    assert sum(ranks) == 2 * 6 < 4 * 6  # what is masked is not saved


def test_plain_adalora_is_what_stock_peft_loads(tmp_path):
    from peft import AdaLoraModel, PeftModel

    model, _ = tiny.trained(tiny.config(**tiny.PLAIN), tmp_path / "run")
    model.save_pretrained(tmp_path / "adapter")
    stock = PeftModel.from_pretrained(tiny.base(), tmp_path / "adapter")
    assert type(stock.base_model) is AdaLoraModel
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["peft_type"] == "ADALORA"
    assert (tiny.logits(model) - tiny.logits(tiny.base())).abs().max() > 1e-3
    torch.testing.assert_close(tiny.logits(stock), tiny.logits(model), rtol=0, atol=1e-6)
    merged = stock.merge_and_unload()
    torch.testing.assert_close(tiny.logits(merged), tiny.logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_modules": ("query",)}, "target_modules: no adapter can be put on this LlamaForCausalLM"),
        ({"init_r": 33}, "init_r: 33 does not fit into model.layers.0.self_attn.v_proj, which is 32 x 64; make it 32"),
    ],
)
def test_a_base_that_does_not_fit_is_said(options, words):
    with pytest.raises(TargetError) as error:
        adapt(tiny.base(), tiny.config(**{**tiny.PLAIN, **options}))
    assert words in str(error.value)


def test_what_is_no_adapter_is_said(tmp_path):
    with pytest.raises(CheckpointError, match=r"adapter_config.json: not found; an adapter's directory has one"):
        load(tmp_path)
    tiny.adapted(tiny.config(**tiny.PLAIN)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="names the base None, which is not there; pass a base"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="the base has no place for 6 tensors of the adapter"):
        load(tmp_path, tiny.base(num_hidden_layers=2))
    with pytest.raises(CheckpointError, match="the adapter cannot be loaded"):
        load(tmp_path, tiny.base(hidden_size=32))
