import pytest
import torch
from safetensors.torch import save_file

from qinit.errors import OutputError
from qinit.linalg.low_rank import LowRank
from qinit.runner import layer as layer_module
from qinit.workplace.kept import apply_polish, load_samples, save_polish, save_samples
from qinit.workplace.place import kept, partial_of
from tests.broken_off import RANDOM, TEXT, Crash, break_off, finish
from tests.helpers import gauss, names, padded, plan_of, random_samples
from tests.jobs import crashing, job_at, solved


def garble(file):
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


class TestSamples:
    @pytest.mark.parametrize("lengths", [None, [12, 5, 9]])
    def test_what_was_kept_is_the_same_text(self, llama, tmp_path, lengths):
        samples = random_samples(3) if lengths is None else padded(random_samples(3), lengths)
        with job_at(plan_of(llama), tmp_path / "out") as job:
            assert load_samples(job.place, job.journal) is None
            save_samples(job.place, job.journal, samples, written=False)
            found = load_samples(job.place, job.journal)
            assert torch.equal(found.tokens, samples.tokens)
            assert found.mask is None if lengths is None else torch.equal(found.mask, samples.mask)
            assert found.origin == samples.origin

    def test_it_outlives_the_process_where_the_model_wrote_it(self, llama, tmp_path):
        plan = plan_of(llama)
        for written in (True, False):
            out = tmp_path / str(written)
            with crashing(plan, out) as job:
                save_samples(job.place, job.journal, random_samples(3), written=written)
            with job_at(plan, out) as job:
                assert (load_samples(job.place, job.journal) is not None) == written

    @pytest.mark.parametrize(
        "damage",
        [
            garble,
            lambda file: file.unlink(),
            lambda file: file.write_bytes(b"{}"),
            lambda file: save_file({"tokens": torch.zeros(3, dtype=torch.long)}, file),
            lambda file: save_file({"words": torch.zeros(3, 2)}, file),
        ],
    )
    def test_what_is_damaged_is_said_and_not_read_anew(self, llama, tmp_path, damage):
        """Another text would make other layers of those that are still to be solved."""
        with job_at(plan_of(llama), tmp_path / "out") as job:
            save_samples(job.place, job.journal, random_samples(3), written=True)
            damage(job.place.partial / "samples.safetensors")
            with pytest.raises(OutputError, match=r"samples\.safetensors: damaged, .* remove .*partial to start anew"):
                load_samples(job.place, job.journal)


class TestPolish:
    @pytest.fixture
    def polished(self, llama, tmp_path):
        """A job whose layers are written, with a polish of one of them kept beside."""
        plan = plan_of(llama, iter=1, target_modules="q_proj")
        first, second = plan.layers
        with job_at(plan, tmp_path / "out") as job:
            for layer in plan.layers:
                job.store.put(layer, *solved(plan, layer))
            factors = plan.adapter.encode(first.target.module, LowRank(gauss(64, 4), gauss(4, 64)), 4, 1.0, 0)
            save_polish(job.store, {"steps": 3, "kept": True}, {first.target.name: 0.25}, factors)
            yield job, first, second, factors

    def test_it_takes_the_place_of_the_adapter(self, polished):
        job, first, second, factors = polished
        before = job.store.low_rank(second)
        for _ in range(2):  # as often as a run is broken off here
            assert apply_polish(job.store) == ({"steps": 3, "kept": True}, {first.target.name: 0.25})
            assert all(torch.equal(job.store.factors.read(name), tensor) for name, tensor in factors.items())
            assert torch.equal(job.store.low_rank(second).B, before.B)

    @pytest.mark.parametrize("damage", [garble, lambda file: file.unlink(), lambda file: file.write_bytes(b"x" * 99)])
    def test_what_is_damaged_is_said(self, polished, damage):
        job, *_ = polished
        damage(job.place.partial / "polished.safetensors")
        with pytest.raises(OutputError, match=r"polished\.safetensors: damaged, so that the unfinished run"):
            apply_polish(job.store)


def test_what_the_model_wrote_is_worth_keeping_and_random_tokens_are_not(strong_llama, place, monkeypatch):
    def crash(*_, **__):
        raise Crash

    monkeypatch.setattr(layer_module, "solve", crash)
    for options, words in ((TEXT, "the text that the model wrote is kept"), (RANDOM, "")):
        with pytest.raises(Crash):
            finish(strong_llama, place / options["calibration"], **options)
        assert kept(place / options["calibration"]).startswith(words)
    assert names(place) == [".self.partial"]


def test_a_damaged_text_is_an_error(strong_llama, place):
    break_off(strong_llama, place / "out", 9, **TEXT)
    file = partial_of(place / "out") / "samples.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(OutputError, match=r"samples\.safetensors: damaged, .* remove .*partial to start anew"):
        finish(strong_llama, place / "out", **TEXT)
