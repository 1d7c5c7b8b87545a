import pytest
import torch

from qinit.stream.blocks import Blocks
from qinit.stream.carried import batches_of
from qinit.stream.front import ends_of, in_front
from tests.helpers import calibrated_plan, names, random_samples
from tests.models import make_float32
from tests.qinit.stream.test_blocks import CPU, on_meta


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return calibrated_plan(make_float32(tmp_path_factory.mktemp("bart") / "bart", "bart"))


def fronts(plan, samples, directory):
    """The fronts of encoder and decoder, where the encoder is left out: its end is its start."""
    blocks, batches = Blocks.of(plan, CPU), list(batches_of(samples, 2))
    encoder = in_front(blocks, blocks.rows[0], samples.tokens, batches, directory / "one", 1)
    decoder = in_front(blocks, blocks.rows[1], samples.tokens, batches, directory / "two", 1, [encoder.hidden])
    assert on_meta(blocks.model)
    return encoder, decoder, batches


def test_a_decoder_s_calls_have_the_encoder_s_end_which_is_kept_once(plan, tmp_path, monkeypatch):
    samples = random_samples(3)
    encoder, decoder, batches = fronts(plan, samples, tmp_path)
    assert not encoder.calls.made
    assert len(decoder.calls.made) == 1
    for batch in batches:
        for index in range(2):
            call = decoder.calls.of(batch, index)
            assert sum(torch.equal(value, encoder.hidden.read(batch)) for value in tensors(call)) == 1
    assert names(tmp_path) == []
    monkeypatch.setattr("qinit.stream.carried.CARRIED_SHARE", 0)
    _, again, _ = fronts(plan, samples, tmp_path)
    assert names(tmp_path) == ["one", "two", "two-0"]
    assert torch.equal(again.calls.made[0].states, decoder.calls.made[0].states)


def tensors(call):
    shape = (2, 12, 32)
    values = (*call.args, *call.kwargs.values())
    return [value for value in values if isinstance(value, torch.Tensor) and value.shape[1:] == shape[1:]]


def test_a_row_that_the_text_never_reaches_has_no_front(plan):
    blocks, samples = Blocks.of(plan, CPU), random_samples(3)
    batches = list(batches_of(samples, 2))
    decoder, encoder = blocks.rows[1], blocks.rows[0]
    blocks.rows = (decoder, encoder)  # as if the model ran the encoder behind the decoder
    assert in_front(blocks, decoder, samples.tokens, batches, None, 1) is None


def test_ends_take_a_gradient_and_are_copies(plan, tmp_path):
    encoder, _, batches = fronts(plan, random_samples(3), tmp_path)
    (one, none) = ends_of(batches[0], [encoder.hidden, None], CPU)
    assert none is None
    assert one.requires_grad
    with torch.no_grad():
        one.zero_()
    assert encoder.hidden.states.any()
