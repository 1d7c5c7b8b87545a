import pytest
import torch

from qinit.train.outputs import observed
from tests.helpers import random_samples
from tests.models import make_checkpoint


def loaded(directory, kind):
    import transformers

    return getattr(transformers, kind).from_pretrained(directory, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_the_state_is_the_last_one_and_the_logits_are_the_model_s(family, tmp_path):
    model = loaded(make_checkpoint(tmp_path / "m", family), "AutoModelForCausalLM")
    tokens = random_samples().tokens
    with torch.no_grad():
        hidden, logits = observed(model, lambda: model(tokens))
        wanted = model(tokens, output_hidden_states=True)
    assert torch.equal(hidden, wanted.hidden_states[-1])
    assert torch.equal(logits, wanted.logits)  # with what a model does to them behind its head


def test_a_model_without_a_head_has_a_state_alone(tmp_path):
    model = loaded(make_checkpoint(tmp_path / "m", "gpt2", model_class="GPT2Model"), "AutoModel")
    tokens = random_samples().tokens
    with torch.no_grad():
        hidden, logits = observed(model, lambda: model(tokens))
        assert torch.equal(hidden, model(tokens).last_hidden_state)
    assert logits is None


@pytest.mark.parametrize("kind", ["AutoModelForCausalLM", "AutoModel"])
def test_it_looks_at_one_run_only(kind, llama):
    model, tokens = loaded(llama, kind), random_samples().tokens
    hooks = [(module._forward_pre_hooks, module._forward_hooks) for module in model.modules()]
    with torch.no_grad():
        observed(model, lambda: model(tokens))
        with pytest.raises(ZeroDivisionError):
            observed(model, lambda: 1 / 0)
    assert not any(hook for pair in hooks for hook in pair)
