import pytest
import torch

from qinit.calibration.states import Ends, in_front_of
from qinit.stream.blocks import Blocks
from qinit.stream.carried import batches_of
from tests.helpers import calibrated_plan, random_samples
from tests.models import make_float32

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return calibrated_plan(make_float32(tmp_path_factory.mktemp("bart") / "bart", "bart"))


def start(plan, directory, number=0, ends=(), sequential=True):
    blocks = Blocks.of(plan, CPU)
    samples = random_samples(3)
    batches = list(batches_of(samples, 2))
    return in_front_of(blocks, blocks.rows[number], number, samples, batches, directory, ends, sequential)


def test_one_model_has_one_stream_and_two_have_three(plan, tmp_path):
    alone = start(plan, tmp_path, sequential=False)
    assert alone.original is alone.repaired is alone.ahead
    both = start(plan, tmp_path)
    assert len({id(states) for states in (both.original, both.repaired, both.ahead)}) == 3
    assert torch.equal(both.original.states, both.repaired.states)
    assert [batch.rows for batch in both.batches] == [slice(0, 2), slice(2, 3)]


def test_each_model_s_decoder_reads_its_own_encoder(plan, tmp_path):
    encoder = start(plan, tmp_path)
    encoder.repaired.states += 1
    decoder = start(plan, tmp_path, 1, [Ends(encoder.original, encoder.repaired)])
    assert torch.equal(decoder.calls.made[0].states, encoder.original.states)
    assert torch.equal(decoder.repaired_calls.made[0].states, encoder.repaired.states)
    assert torch.equal(decoder.original.states, decoder.repaired.states)  # what it starts from is the text alone
    seen = [value for value in decoder.probe_calls[1].args if isinstance(value, torch.Tensor)]
    assert any(torch.equal(value, encoder.original.states[:1]) for value in seen)


def test_a_row_that_is_not_reached_has_none(plan, tmp_path):
    assert start(plan, tmp_path, 1) is None
