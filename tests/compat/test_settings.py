"""The adapter's configuration, for who loads the adapter and for who takes its settings alone."""

import pytest
import torch

from qinit.adapters import ADAPTER_DIRECTORY
from tests.helpers import edit_json
from tests.stock import load_base, logits, quantize


@pytest.fixture
def run(llama, tmp_path):
    quantize(llama, tmp_path / "run", format="dense")
    return tmp_path / "run"


@pytest.mark.parametrize("trainable", [True, False])
def test_who_loads_the_adapter_gets_the_same_whatever_inference_mode_says(run, trainable):
    from peft import PeftModel

    found = []
    for value in (True, False):
        edit_json(
            run / ADAPTER_DIRECTORY / "adapter_config.json",
            lambda config, value=value: config.update(inference_mode=value),
        )
        model = PeftModel.from_pretrained(load_base(run), run, subfolder=ADAPTER_DIRECTORY, is_trainable=trainable)
        asks = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        assert {name for name in asks if asks[name]} == {name for name in asks if trainable and "lora_" in name}
        assert model.peft_config["default"].inference_mode is not trainable
        found.append((asks, logits(model)))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_the_settings_alone_make_an_adapter_that_is_trained(run):
    """As TRL does with `peft_config`."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load_base(run), LoraConfig.from_pretrained(run / ADAPTER_DIRECTORY))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 28
    assert all("lora_" in name for name in trained)
