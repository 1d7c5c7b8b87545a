import pytest
import torch
from safetensors.torch import save_file

from qinit.errors import OutputError
from qinit.formats import FORMATS
from qinit.linalg.low_rank import LowRank
from qinit.runner import layer as layer_module
from qinit.workplace.kept import apply_polish, load_samples, save_polish, save_samples
from qinit.workplace.place import kept, partial_of
from tests.broken_off import RANDOM, TEXT, Crash, break_off, finish
from tests.helpers import gauss, names, padded, plan_of, random_samples, weights_of
from tests.jobs import CPU, crashing, job_at, solved


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
    ERRORS = (0.5, 0.25)  # of Q alone, of Q + L

    def polished(self, job):
        """Write all layers, and keep a polish of the first one's factors and scales beside; returns its tensors."""
        plan = job.plan
        for layer in plan.layers:
            job.store.put(layer, *solved(plan, layer))
        first = plan.layers[0]
        tensors = plan.adapter.encode(first.target.module, LowRank(gauss(64, 4), gauss(4, 64)), 4, 1.0, 0)
        tensors |= FORMATS["gptq"].scales(first.target, job.store.codes(first).scales * 1.01)
        save_polish(job.store, {"steps": 3, "kept": True}, {first.target.name: self.ERRORS}, tensors)
        return tensors

    @pytest.fixture
    def plan(self, llama):
        return plan_of(llama, iter=1, format="gptq", target_modules="q_proj")

    def test_it_takes_the_place_of_factors_and_scales(self, plan, tmp_path):
        with job_at(plan, tmp_path / "out") as job:
            tensors = self.polished(job)
            first, second = plan.layers
            before = job.store.weight(second, CPU)
            specs = {spec.name: job.store.base.read(spec.name) for spec in first.specs}
            for _ in range(2):  # as often as a run is broken off here
                assert apply_polish(job.store) == ({"steps": 3, "kept": True}, {first.target.name: self.ERRORS})
                for name, tensor in tensors.items():
                    writer = job.store.factors if job.store.factors.has(name) else job.store.base
                    assert torch.equal(writer.read(name), tensor)
                assert torch.equal(job.store.weight(second, CPU), before)
            changed = [name for name, old in specs.items() if not torch.equal(job.store.base.read(name), old)]
            assert changed == [first.target.prefix + "scales"]

    @pytest.mark.parametrize("applied", [0, 1, 2, 3])
    def test_a_layer_whose_tensors_are_replaced_in_part_is_finished_all_the_same(self, plan, tmp_path, applied):
        with crashing(plan, tmp_path / "out") as job:
            tensors = self.polished(job)
            for name, tensor in list(tensors.items())[:applied]:
                job.store.replace(name, tensor)
        with job_at(plan, tmp_path / "out") as job:
            assert len(job.store.rows) == 2
            result, errors = apply_polish(job.store)
            assert (result, {name: tuple(pair) for name, pair in errors.items()}) == (
                {"steps": 3, "kept": True},
                {plan.layers[0].target.name: self.ERRORS},
            )
            for name, tensor in tensors.items():
                writer = job.store.factors if job.store.factors.has(name) else job.store.base
                assert torch.equal(writer.read(name), tensor)

    @pytest.mark.parametrize("part", ["qweight", "qzeros"])
    def test_codes_that_are_damaged_meanwhile_are_made_again(self, plan, tmp_path, part):
        with crashing(plan, tmp_path / "out") as job:
            self.polished(job)
            name = plan.layers[0].target.prefix + part
            job.store.replace(name, job.store.base.read(name) + 1)
        with job_at(plan, tmp_path / "out") as job:
            assert list(job.store.rows) == [plan.layers[1].target.name]

    def test_one_that_gained_nothing_changes_nothing(self, plan, tmp_path):
        with job_at(plan, tmp_path / "out") as job:
            for layer in plan.layers:
                job.store.put(layer, *solved(plan, layer))
            before = weights_of(job.place.run)
            save_polish(job.store, {"kept": False}, {}, {})
            assert apply_polish(job.store) == ({"kept": False}, {})
            assert weights_of(job.place.run) == before

    @pytest.mark.parametrize("damage", [garble, lambda file: file.unlink(), lambda file: file.write_bytes(b"x" * 99)])
    def test_what_is_damaged_is_said(self, plan, tmp_path, damage):
        with job_at(plan, tmp_path / "out") as job:
            self.polished(job)
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
