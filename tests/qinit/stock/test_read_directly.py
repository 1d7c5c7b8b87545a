import pytest
import torch
from torch import nn

from qinit.stock.inputs import possible_inputs
from qinit.stock.read_directly import read_directly


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", set()),
        ("mamba", {"backbone.layers.0.mixer.dt_proj"}),
        ("siglip", {"head.attention.out_proj"}),  # of torch's nn.MultiheadAttention
        ("qwen3_moe", set()),  # its experts are routed by numbers, which a model without weights has not
    ],
)
def test_a_weight_that_no_forward_uses_is_found(family, expected, skeleton):
    built = skeleton(family)
    model = built.build()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    trials = list(possible_inputs(model, built.checkpoint.directory))
    assert read_directly(model, linear, trials, lambda: built.build(include_buffers=False)) == expected


class Model(nn.Module):
    """A model as far as the probe knows one; `use` is what it does with its three layers."""

    def __init__(self, use):
        super().__init__()
        self.use = use
        with torch.device("meta"):
            self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, input_ids, use_cache):
        x = torch.zeros(*input_ids.shape, 8, device=input_ids.device)
        return self.use(self, x)

    def tie_weights(self):
        pass


def both(model, x):
    return model.a(x) @ model.a.weight.T


def for_its_type(model, x):
    return model.a(x.to(model.b.weight.dtype).to(model.b.weight).view(-1, model.b.weight.shape[0]))


def one_by_values(model, x):
    y = x @ model.b.weight.T
    return y[y.sum(-1) > 0] if y.cpu().tolist() else y


def loud(model, x):
    raise RuntimeError("no")


@pytest.mark.parametrize(
    ("use", "expected"),
    [
        (lambda model, x: torch.matmul(x, model.a.weight.T), {"a"}),
        (lambda model, x: torch.einsum("bti,oi->bto", x, model.b.weight.float()), {"b"}),
        (lambda model, x: nn.functional.linear(x, model.b.weight) + model.a(x), {"b"}),
        (lambda model, x: torch.stack([model.a.weight, model.b.weight]) @ model.c(x)[0].T, {"a", "b"}),
        (both, set()),
        (for_its_type, set()),
        (lambda model, x: model.a(x) if x.sum() > 0 else x, set()),
        (one_by_values, {"b"}),  # on zeros, as no pass without values ends
        (loud, set()),
    ],
)
def test_only_what_is_used_for_its_values_and_never_called_counts(use, expected):
    model = Model(use)
    linear = {name: getattr(model, name) for name in "abc"}
    trials = [{"input_ids": torch.zeros(1, 4, dtype=torch.long)}]
    assert read_directly(model, linear, trials, lambda: Model(use)) == expected
    assert all(module.weight.is_meta for module in linear.values())
    assert not any(module._forward_pre_hooks for module in linear.values())
