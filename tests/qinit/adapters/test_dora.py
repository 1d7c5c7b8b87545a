"""Magnitudes that leave the start as it is, held against PEFT's own, and applied again as PEFT does."""

import pytest
import torch

from qinit.adapters import ADAPTERS, adapter_of
from qinit.linalg.low_rank import LowRank
from qinit.source.targets import LinearModule
from tests.helpers import gauss

DORA, LORA = ADAPTERS["dora"], ADAPTERS["lora"]
UP = LinearModule("model.up_proj", 12, 8, transposed=False)
FACTORS = LowRank(gauss(12, 3), gauss(3, 8))
BASE = gauss(12, 8, seed=1)
CONFIG = {"peft_type": "LORA", "use_dora": True, "lora_alpha": 6, "r": 3}


def parts(tensors):
    return {DORA.part_of(name)[1]: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("factors", [None, FACTORS])
def test_magnitudes_are_the_lengths_of_the_rows(factors):
    stored = DORA.encode(UP, factors, 3, 2.0, 0, BASE)
    weight = BASE if factors is None else BASE + factors.B @ factors.A
    found = parts(stored)
    torch.testing.assert_close(found["magnitude"], weight.norm(dim=1))
    torch.testing.assert_close(DORA.apply(UP.name, BASE.clone(), found, CONFIG), weight)
    specs = DORA.file_specs([(UP, 3)])
    assert {spec.name: spec.shape for spec in specs} == {name: tuple(t.shape) for name, t in stored.items()}
    assert stored["base_model.model.model.up_proj.lora_A.weight"].equal(
        next(iter(LORA.encode(UP, factors, 3, 2, 0).values()))
    )


def test_trained_magnitudes_are_applied_as_peft_applies_them():
    import peft

    class Toy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj = torch.nn.Linear(8, 12, bias=False)
            self.up_proj.weight.data = BASE.clone()

        def forward(self, x):
            return self.up_proj(x)

    settings = peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=["up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(Toy(), settings)
    model.base_model.model.up_proj.lora_magnitude_vector["default"].weight.data *= 1 + gauss(12).abs()
    saved = parts(peft.get_peft_model_state_dict(model))
    x = gauss(5, 8, seed=2)
    torch.testing.assert_close(x @ DORA.apply("up_proj", BASE.clone(), saved, CONFIG).T, model(x).detach())


def test_a_saved_adapter_is_known_by_its_configuration():
    assert adapter_of(CONFIG) is DORA
    assert adapter_of({**CONFIG, "use_dora": False}) is LORA
    whole = {"x": dict.fromkeys(("A", "B", "magnitude"))}
    assert DORA.beyond(CONFIG, whole) is None
    assert DORA.beyond(CONFIG, {"x": dict.fromkeys(("A", "B"))}) == "x without its magnitude"
    assert DORA.beyond(CONFIG, {"x": dict.fromkeys(("A", "magnitude"))}) == "x with one of its factors"
