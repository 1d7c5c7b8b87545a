from dataclasses import replace

import yaml

from qinit.snndlft.card import card_text
from tests.qinit.snndlft.test_page import report


def front(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_says_what_it_is_and_how_it_is_loaded():
    card = card_text(report())
    assert front(card) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["qinit", "snn-dlft", "spiking", "adalora"],
    }
    assert "An adapter for `<tiny>` that `qinit snndlft` trained" in card
    assert 'model = qinit.snndlft.load(".")' in card
    assert 'Needs `pip install "qinit[snn]"`.' in card
    assert "| f1 | 0.5000 before, 0.7500 after 2 steps |" in card
    assert "- a note\n" in card


def test_a_plain_classifier_on_a_model_of_the_hub():
    plain = {"spiking": False, "layer_wise": "all", "time_steps": 4}
    card = card_text(replace(report(), model="owner/name", classes=("a", "b"), config=plain))
    assert front(card) == {
        "base_model": "owner/name",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "tags": ["qinit", "adalora"],
    }
    assert "AdaLoRA, which stock PEFT loads and merges" in card
    assert "Needs" not in card
