import pytest

from qinit.adapters import ADAPTERS
from qinit.errors import TargetError
from qinit.recipe import make_recipe
from qinit.source.targets import architecture_of
from qinit.stock import settle as settling
from qinit.stock.adapting import Refused
from qinit.stock.settle import settle, whole_parameters

LORA = ADAPTERS["lora"]
RECIPE = make_recipe(rank=4)


def settled(skeleton, endings=("",)):
    architecture = architecture_of(skeleton.build(), skeleton.checkpoint)
    ranks = [(m, min(4, m.out_features)) for m in architecture.linear if m.name.endswith(endings)]
    found = settle(skeleton, RECIPE, LORA, architecture, ranks)
    rest = [(module, rank) for module, rank in ranks if module.name not in found.left]
    assert whole_parameters(skeleton, RECIPE, LORA, architecture, rest) == found.whole
    return found, [module.name for module, _ in rest]


def test_all_of_a_plain_model_is_repaired(skeleton):
    found, rest = settled(skeleton("llama"))
    assert (found.left, found.whole, len(rest)) == ({}, {}, 14)


@pytest.mark.parametrize(
    ("family", "reasons"),
    [
        ("llama_head", {"score": "trained whole by PEFT"}),
        ("distilbert", {"pre_classifier": "trained whole by PEFT", "classifier": "trained whole by PEFT"}),
        ("mamba", {"mixer.dt_proj": "the model reads the weight directly", "mixer.out_proj": "peft: .*Mamba-based"}),
        (
            "qwen3_moe",
            dict.fromkeys(
                ("0.mlp.gate_proj", "0.mlp.up_proj", "0.mlp.down_proj"), "PEFT would put the adapter on the exp"
            ),
        ),
        ("siglip", {"head.attention.out_proj": "the model reads the weight directly"}),
    ],
)
def test_what_the_loaders_do_not_repair_is_left_alone_with_the_reason(family, reasons, skeleton):
    import re

    found, rest = settled(skeleton(family))
    assert len(found.left) == len(reasons)
    for ending, reason in reasons.items():
        (said,) = [said for name, said in found.left.items() if f".{name}".endswith(f".{ending}")]
        assert re.match(reason, said)
    assert rest


def test_a_head_lies_in_the_adapter_even_if_it_was_not_chosen(skeleton):
    found, rest = settled(skeleton("llama_head"), ("q_proj",))
    assert found.left == {}
    assert found.whole == {"base_model.model.score.weight": "score.weight"}
    assert len(rest) == 2


def test_a_module_that_does_more_than_a_product_is_left_alone(skeleton):
    from dataclasses import replace

    architecture = architecture_of(skeleton("llama").build(), skeleton("llama").checkpoint)
    odd = replace(architecture.linear[0], plain=False, subclass="Router")
    found = settle(skeleton("llama"), RECIPE, LORA, architecture, [(odd, 4), (architecture.linear[1], 4)])
    assert found.left == {odd.name: "class Router does more than W x + b"}


def test_nothing_is_left_where_all_is_refused(skeleton):
    found, rest = settled(skeleton("mamba"), ("out_proj",))
    assert len(found.left) == 1
    assert rest == []


def test_an_adapter_that_is_refused_whatever_is_left_out_is_an_error(skeleton, monkeypatch):
    def refuse(_skeleton, _config, tensors):
        if len(tensors) > 2:
            raise Refused("too many")
        return whole

    from qinit.stock.adapting import Adapted

    whole = Adapted({}, {}, frozenset(), False)
    monkeypatch.setattr(settling, "adapt", refuse)
    with pytest.raises(TargetError, match="PEFT refuses the adapter: too many; choose others with"):
        settled(skeleton("llama"))


def test_adapters_on_more_than_was_chosen_are_an_error(skeleton, monkeypatch):
    from dataclasses import replace

    real = settling.adapt

    def more(built, config, tensors):
        found = real(built, config, tensors)
        return replace(found, tensors={**found.tensors, "base_model.model.x.lora_A.weight": (4, 4)})

    monkeypatch.setattr(settling, "adapt", more)
    with pytest.raises(TargetError, match=r"on more than the chosen modules \(base_model\.model\.x\.lora_A\.weight\)"):
        settled(skeleton("llama"))
