import pytest
import torch

from qinit.errors import CheckpointError
from qinit.trial.twin import build_twin, trained_whole, weights_of
from tests.helpers import edit_tensors, quantize
from tests.models import make_checkpoint
from tests.stock import load, logits, relative


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}])
def test_it_predicts_what_the_loaded_model_does_with_tied_embeddings_too(options, tmp_path):
    quantize(make_checkpoint(tmp_path / "source", **options), tmp_path / "run", format="dense")
    twin = build_twin(weights_of(tmp_path / "run", tmp_path / "run/eqft_init"), {})
    assert relative(logits(twin), logits(load(tmp_path / "run"))) < 1e-5
    assert (twin.lm_head.weight is twin.model.embed_tokens.weight) == bool(options)


def test_a_parameter_without_a_tensor_is_an_error_unless_it_is_given(llama, tmp_path):
    quantize(llama, tmp_path / "run", format="dense")
    weights = weights_of(tmp_path / "run", tmp_path / "run/eqft_init")
    head = weights.names._stored.pop("lm_head.weight").read()
    with pytest.raises(CheckpointError, match=r"no tensor for the parameter lm_head\.weight"):
        build_twin(weights, {})
    assert torch.equal(build_twin(weights, {"lm_head.weight": head}).lm_head.weight, head.float())


def test_what_was_trained_whole_is_in_the_adapter_s_file(llama, tmp_path):
    quantize(llama, tmp_path / "run", format="dense")
    adapter = tmp_path / "run/eqft_init"
    assert trained_whole(adapter) == {}
    head = torch.ones(256, 64)

    def add(tensors):
        tensors["base_model.model.lm_head.weight"] = head

    edit_tensors(adapter / "adapter_model.safetensors", add)
    assert torch.equal(trained_whole(adapter)["lm_head.weight"], head)
    assert weights_of(tmp_path / "run", adapter).adapter.parts.keys().isdisjoint({"lm_head"})
