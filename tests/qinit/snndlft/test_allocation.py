import pytest
import torch

from qinit.snndlft.allocation import LayerwiseAllocator
from qinit.snndlft.layers import layers_of
from tests.qinit.snndlft import tiny


def stepped(tuner, step):
    """Give every adapter the gradient of this step, and take one of SGD."""
    generator = torch.Generator().manual_seed(step)
    for name, parameter in tuner.model.named_parameters():
        if "lora_" in name:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            parameter.data -= 0.01 * parameter.grad


@pytest.mark.parametrize(("tinit", "tfinal", "delta"), [(0, 0, 1), (2, 2, 2)])
def test_masks_are_those_of_pefts_allocator_on_the_same_gradients(tinit, tfinal, delta):
    options = tiny.config(tinit=tinit, tfinal=tfinal, deltaT=delta, **tiny.PLAIN)
    ours, stock = tiny.adapted(options).base_model, tiny.adapted(options).base_model
    for tuner in (ours, stock):
        tuner.peft_config["default"].total_step = 8
    allocator, seen = LayerwiseAllocator(ours.model, ours.peft_config["default"], "default"), set()
    for step in range(1, 9 - tfinal):
        for tuner in (ours, stock):
            stepped(tuner, step)
        allocated = allocator.schedule(ours.model, step)
        stock.update_and_allocate(step)
        assert allocated == (step == 8 - tfinal or (step > tinit and step % delta == 0))
        for (name, mine), (_, theirs) in zip(ours.named_parameters(), stock.named_parameters(), strict=True):
            assert torch.equal(mine, theirs), (step, name)
        seen.add(sum(layer.ranks for layer in layers_of(ours.model, "default")))
    assert min(seen) == 2 * 6  # target_r for each of 6 modules
    assert max(seen) > min(seen)


def test_what_has_no_gradient_keeps_its_importance():
    tuner = tiny.adapted(tiny.config(**tiny.PLAIN)).base_model
    allocator = LayerwiseAllocator(tuner.model, tuner.peft_config["default"], "default")
    layers = layers_of(tuner.model, "default")
    stepped(tuner, 1)
    allocator.update_ipt(tuner.model)
    first = [allocator.importance(layer) for layer in layers]
    stepped(tuner, 2)
    for parameter in layers[0].parameters:
        parameter.grad = None
    allocator.update_ipt(tuner.model)
    second = [allocator.importance(layer) for layer in layers]
    assert second[0] == first[0] > 0
    assert second[1] != first[1]
    other = LayerwiseAllocator(tuner.model, tuner.peft_config["default"], "default")
    other.restore(allocator.state(), tuner.model)
    assert [other.importance(layer) for layer in layers] == second


def test_importance_is_the_sum_over_triplets_of_smoothed_sensitivity_times_uncertainty():
    tuner = tiny.adapted(tiny.config(**tiny.PLAIN)).base_model
    allocator = LayerwiseAllocator(tuner.model, tuner.peft_config["default"], "default")
    layer = layers_of(tuner.model, "default")[1]
    stepped(tuner, 1)
    allocator.update_ipt(tuner.model)
    total = 0.0
    for parts in layer.modules.values():
        scores = {}
        for part, parameter in parts.items():
            sensitivity = (parameter * parameter.grad).detach().abs()
            smooth = 0.15 * sensitivity
            scores[part] = smooth * 0.15 * (sensitivity - smooth).abs()
        for i in range(4):
            total += scores["lora_E"][i, 0] + scores["lora_A"][i].mean() + scores["lora_B"][:, i].mean()
    assert allocator.importance(layer) == pytest.approx(float(total), rel=1e-5)
