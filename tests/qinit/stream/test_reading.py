import pytest
import torch

from qinit.stream.blocks import Blocks
from qinit.stream.carried import batches_of
from qinit.stream.front import ends_of
from qinit.stream.reading import read_through
from qinit.stream.whole import load_whole, read_tokens
from tests.helpers import calibrated_plan, exhausted, names, padded, random_samples
from tests.models import make_float32
from tests.qinit.stream.test_blocks import CPU, STREAMABLE, on_meta
from tests.traces import assert_close, stock_states


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("family", STREAMABLE)
def test_the_states_behind_the_last_block_are_those_of_the_whole_model(family, mask, place, tmp_path, monkeypatch):
    monkeypatch.setattr("qinit.stream.carried.CARRIED_SHARE", 0.25 if place == "memory" else 0)
    plan = calibrated_plan(make_float32(tmp_path / family, family))
    samples = padded(random_samples(5), [12, 3, 7, 12, 9]) if mask else random_samples(5)
    (tmp_path / "scratch").mkdir()
    blocks, batches = Blocks.of(plan, CPU), list(batches_of(samples, 2))
    ends, done = exhausted(read_through(blocks, samples.tokens, batches, tmp_path / "scratch/states"))
    assert done == list(range(1, 1 + sum(map(len, blocks.rows))))
    files = ["states"] if len(blocks.rows) == 1 else ["states", "states-row1", "states-row1-0"]
    assert names(tmp_path / "scratch") == ([] if place == "memory" else files)
    assert on_meta(blocks.model)
    wanted = stock_states(plan, samples)[-1]  # of the first row, which the second one reads
    kept = torch.ones_like(samples.tokens, dtype=torch.bool) if samples.mask is None else samples.mask
    for batch in batches:
        rows = batch.of(kept)
        assert_close(ends[0].read(batch)[rows], batch.of(wanted)[rows], 1e-4)


def test_one_block_at_a_time_is_in_memory(tmp_path):
    plan, samples = calibrated_plan(make_float32(tmp_path / "m", num_hidden_layers=3)), random_samples()
    blocks = Blocks.of(plan, CPU)
    row = blocks.rows[0]
    loaded, real = [], row.load

    def load(index):
        block = real(index)
        loaded.append({name.split(".")[2] for name, p in blocks.model.named_parameters() if not p.is_meta})
        return block

    row.load = load
    exhausted(read_through(blocks, samples.tokens, list(batches_of(samples, 3)), tmp_path / "states"))
    assert loaded == [{"0"}, {"1"}, {"2"}]


def test_no_gradient_is_kept(llama, tmp_path):
    samples = random_samples()
    steps = read_through(Blocks.of(calibrated_plan(llama), CPU), samples.tokens, list(batches_of(samples, 3)), tmp_path)
    with torch.enable_grad():
        next(steps)
        assert torch.is_grad_enabled()  # outside of it, all is as it was
        (ends, _) = exhausted(steps)
    assert not ends[0].states.requires_grad


@torch.no_grad()
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_hands_its_output_to_the_decoder(family, tmp_path):
    plan, samples = calibrated_plan(make_float32(tmp_path / family, family)), padded(random_samples(3), [12, 3, 7])
    blocks, batches = Blocks.of(plan, CPU), list(batches_of(samples, 2))
    ends, _ = exhausted(read_through(blocks, samples.tokens, batches, tmp_path / "states"))
    wanted = read_tokens(load_whole(plan), samples.tokens, samples.mask, plan).logits
    with blocks.surroundings(head=True):
        for batch in batches:
            found = blocks.after(batch.of(samples.tokens), batch.long_mask, ends_of(batch, ends, CPU)).logits
            assert_close(found[batch.mask], batch.of(wanted)[batch.mask], 1e-4)
