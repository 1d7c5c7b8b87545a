import pytest

from qinit.errors import CheckpointError
from qinit.families import FAMILIES, trial
from qinit.families.trial import not_trained


def test_a_family_whose_adapter_gets_no_gradient_is_not_trained(monkeypatch):
    import peft

    def frozen(model, config):
        return peft.PeftModelForCausalLM(model, config).requires_grad_(False)

    assert not_trained("lokr", None) is None
    monkeypatch.setattr("peft.get_peft_model", frozen)
    trial._not_trained.cache_clear()
    try:
        assert "does not require grad" in not_trained("lokr", None)
    finally:
        trial._not_trained.cache_clear()


def test_a_form_that_does_not_run_here_is_no_reason_against_a_family():
    with pytest.raises(CheckpointError, match="transformers does not load it"):
        not_trained("ia3", {"quant_method": "punched-cards"})


def test_every_family_is_one_of_peft_s_and_has_a_paper():
    import peft

    for name, family in FAMILIES.items():
        assert getattr(peft, family.config)(**({"total_step": 10_000} if name == "adalora" else {})).peft_type
        assert family.paper.startswith("arXiv:")
