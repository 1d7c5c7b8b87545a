import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import qinit.train.polish
from qinit.errors import CalibrationError
from qinit.events import Progress
from qinit.linalg.low_rank import LowRank
from qinit.train.bases import CodedBase
from qinit.train.polish import Polished, divergence, polish, polish_flops
from qinit.train.student import Start, student_of
from tests.helpers import contents, exhausted, gauss, padded
from tests.models import make_checkpoint
from tests.qinit.train.starts import CPU, begin, dense, polished, same, taught, text, weight_of
from tests.traces import stock


def with_factors(starts, change):
    """The same starts with other factors."""
    return {name: replace(start, low_rank=change(start.low_rank)) for name, start in starts.items()}


def zeros(low_rank):
    return LowRank(torch.zeros_like(low_rank.B), torch.zeros_like(low_rank.A))


class TestProgress:
    def test_the_held_out_loss_falls(self, start):
        events, result = polished(*start, text(33), steps=40)
        assert result.kept
        assert result.after < 0.95 * result.before
        assert result.after == min(e.held_out for e in events if e.held_out is not None)

    def test_the_start_and_every_step_are_told(self, start):
        events, result = polished(*start, steps=25)
        assert isinstance(result, Polished)
        assert [e.step for e in events] == list(range(26))
        assert all(isinstance(e, Progress) and math.isfinite(e.loss) for e in events)
        assert [e.step for e in events if e.held_out is not None] == [0, 10, 20, 25]
        assert events[0].loss == events[0].held_out == result.before
        assert result.steps == 25

    def test_a_long_one_is_judged_so_many_times_and_no_more(self, start, monkeypatch):
        monkeypatch.setattr("qinit.train.polish.MOST_EVALUATIONS", 2)
        events, _ = polished(*start, steps=24, batch_size=1)
        assert [e.step for e in events if e.held_out is not None] == [0, 12, 24]

    def test_every_factor_and_scale_of_every_layer_moves_and_nothing_else(self, start):
        plan, starts = start
        source = contents(plan.checkpoint.directory)
        bases = {name: (s.base.codes, s.base.zeros, s.base.scales) for name, s in starts.items()}
        before = {name: [tensor.clone() for tensor in tensors] for name, tensors in bases.items()}
        factors = {name: (s.low_rank.B.clone(), s.low_rank.A.clone()) for name, s in starts.items()}
        _, result = polished(plan, starts)
        assert result.layers.keys() == starts.keys()
        for name, trained in result.layers.items():
            base, (B, A) = starts[name].base, factors[name]
            assert all(map(torch.equal, bases[name], before[name]))  # they stay as they are
            assert torch.equal(starts[name].low_rank.B, B)
            assert torch.equal(starts[name].low_rank.A, A)
            found = trained.low_rank
            assert (found.B.shape, found.A.shape, trained.scales.shape) == (B.shape, A.shape, base.scales.shape)
            assert found.B.dtype == found.A.dtype == trained.scales.dtype == torch.float32
            assert not any(tensor.requires_grad for tensor in (found.B, found.A, trained.scales))
            assert not torch.allclose(found.B @ found.A, B @ A, rtol=0, atol=1e-4 * float((B @ A).abs().max()))
            moved = (trained.scales / base.scales - 1).abs()
            assert 0 < float(moved.max()) < 0.2
            assert float((moved > 0).float().mean()) > 0.9
        assert contents(plan.checkpoint.directory) == source

    def test_the_codes_and_zero_points_of_the_student_stay(self, start, tmp_path):
        plan, starts = start
        lessons = taught(plan, text(), tmp_path)
        with student_of(plan, starts, CPU) as student:
            bases = {name: m for name, m in student.named_modules() if isinstance(m, CodedBase)}
            frozen = {name: p.clone() for name, p in student.named_parameters() if not p.requires_grad}
            before = {name: (base.codes.clone(), base.zeros.clone()) for name, base in bases.items()}
            exhausted(polish(student, lessons, text(), steps=5, seed=0))
            for name, base in bases.items():
                assert all(map(torch.equal, (base.codes, base.zeros), before[name]))
                assert bool(base.stretch.any())
            assert all(torch.equal(student.get_parameter(name), value) for name, value in frozen.items())


class TestLoss:
    """The loss at step 0, from the definition, on the sample that is held out."""

    def by_definition(self, start, sample, top):
        plan, starts = start
        teacher, student = stock(plan), stock(plan)
        for name, each in starts.items():
            student.get_submodule(name).weight.data = weight_of(each) + each.low_rank.B @ each.low_rank.A
        with torch.no_grad():
            t, s = (model(sample[None], output_hidden_states=True) for model in (teacher, student))
        p, q = t.logits[0].softmax(-1), s.logits[0].softmax(-1)
        likely = p.topk(top, -1).indices
        p, q = (torch.cat([part.gather(-1, likely), 1 - part.gather(-1, likely).sum(-1, True)], -1) for part in (p, q))
        kl = torch.where(p > 1e-5, p * (p.log() - q.log()), 0.0).sum(-1).mean()
        error = (s.hidden_states[-1] - t.hidden_states[-1]).square().sum() / t.hidden_states[-1].square().sum()
        return float(kl + qinit.train.polish.HIDDEN_WEIGHT * error)

    @pytest.mark.parametrize("top", [64, 256])
    def test_it_is_that_of_the_model_with_its_adapters(self, start, top, monkeypatch):
        monkeypatch.setattr("qinit.train.teacher.TOP", top)
        samples = text(5)
        before = polished(*start, samples, steps=0)[1].before
        losses = [self.by_definition(start, sample, top) for sample in samples.tokens]
        # The source's outputs are kept in 16 bits.
        assert min(abs(before / loss - 1) for loss in losses) < 5e-3

    def test_in_small_parts_it_and_its_gradient_are_the_same(self, start, monkeypatch):
        whole = polished(*start, text(17), steps=2)[0]
        monkeypatch.setattr("qinit.train.polish.MICRO_BYTES", 1)
        parts = polished(*start, text(17), steps=2)[0]
        assert [e.loss for e in parts] == pytest.approx([e.loss for e in whole], rel=1e-5)

    def test_padding_is_never_looked_at(self, start):
        lengths = [10 if row % 2 == 0 else 16 for row in range(9)]
        results = [polished(*start, padded(text(), lengths, filler), steps=10)[1] for filler in (0, 7)]
        assert results[0].before == results[1].before
        assert same(*results)
        assert results[0].before != polished(*start, steps=10)[1].before

    def test_a_batch_has_its_tokens_without_the_padding(self, start, monkeypatch):
        monkeypatch.setattr("qinit.train.polish.BATCH_TOKENS", 32)
        seen = []
        real = qinit.train.polish.batches
        monkeypatch.setattr("qinit.train.polish.batches", lambda *given: seen.append(given[1].batch) or real(*given))
        polished(*start, padded(text(), [4] * 9), steps=1, batch_size=None)
        polished(*start, steps=1, batch_size=None)
        assert seen == [8, 2]


class TestDivergence:
    def outputs(self, top):
        p, logits = gauss(5, 32, scale=2.0).log_softmax(-1), gauss(5, 32, seed=1, scale=2.0)
        log_probs, ids = p.topk(top, dim=-1)
        whole = (p.exp() * (p - logits.log_softmax(-1))).sum(-1)
        return divergence(logits, log_probs, ids), whole

    def test_of_the_whole_vocabulary_it_is_the_whole_kl(self):
        torch.testing.assert_close(*self.outputs(32))

    def test_of_a_part_it_is_a_lower_bound_that_rises_with_the_part(self):
        found = [self.outputs(top)[0] for top in (1, 4, 16, 31, 32)]
        for fewer, more in pairwise(found):
            assert bool((fewer <= more + 1e-6).all())
        assert bool((found[0] >= 0).all())

    def test_of_the_same_distribution_it_is_nothing(self):
        logits = gauss(5, 32, scale=3.0)
        for top in (1, 8, 32):
            log_probs, ids = logits.log_softmax(-1).topk(top, dim=-1)
            assert float(divergence(logits, log_probs, ids).abs().max()) < 1e-5

    def test_a_token_that_is_certain_leaves_a_finite_rest(self):
        logits = torch.zeros(1, 8)
        logits[0, 3] = 100.0
        found = divergence(torch.zeros(1, 8), *logits.log_softmax(-1).topk(2, dim=-1))
        assert bool(found.isfinite().all())
        assert float(found) == pytest.approx(math.log(8), rel=1e-4)


class TestSame:
    def test_the_same_seed_gives_the_same_bytes_and_another_one_others(self, start):
        results = [polished(*start, text(33), seed=seed)[1] for seed in (3, 3, 4)]
        assert results[0].kept
        assert same(results[0], results[1])
        assert not same(results[0], results[2])

    def test_how_the_product_is_shared_between_the_factors_does_not_matter(self, start):
        plan, starts = start
        lopsided = with_factors(starts, lambda factors: LowRank(factors.B * 100, factors.A / 100))
        one, other = (polished(plan, each, steps=10)[1] for each in (starts, lopsided))
        assert one.after == pytest.approx(other.after, rel=1e-2)


class TestStarts:
    def test_nothing_to_gain_gives_nothing_back(self, tmp_path):
        plan, starts = begin(make_checkpoint(tmp_path / "model"))
        weights = {name: p.detach() for name, p in stock(plan).named_parameters()}
        fresh = {
            name: Start(weights[f"{name}.weight"], LowRank(torch.zeros_like(s.low_rank.B), s.low_rank.A))
            for name, s in starts.items()
        }
        _, result = polished(plan, fresh)
        assert not result.kept
        assert result.layers == {}
        assert result.after == result.before

    def test_a_plain_lora_start_can_be_polished(self, start):
        plan, starts = start
        _, result = polished(plan, with_factors(starts, zeros), text(33), steps=30)
        assert result.kept
        assert all(bool(trained.low_rank.B.any()) for trained in result.layers.values())

    def test_layers_that_are_not_quantized_and_adapters_of_layers_that_are_not(self, start):
        plan, starts = start
        first, *others = starts
        before = polished(plan, starts, steps=0)[1].before
        some = {name: starts[name] for name in others}
        assert polished(plan, some, steps=0)[1].before < before
        weight = stock(plan).get_parameter(f"{first}.weight").detach()
        low_rank = LowRank(torch.zeros_like(starts[first].low_rank.B), starts[first].low_rank.A)
        _, result = polished(plan, {first: Start(weight, low_rank), **some})
        assert result.before < before
        assert bool(result.layers[first].low_rank.B.any())
        assert result.layers[first].scales is None
        assert all(result.layers[name].scales is not None for name in others)

    def test_bases_may_be_16_bit(self, start):
        plan, starts = start
        halves = dense(starts, torch.bfloat16)
        _, result = polished(plan, halves, steps=10)
        assert result.kept
        assert same(result, polished(plan, dense(halves), steps=10)[1])

    def test_the_scales_are_worth_training(self, start):
        """Beside the same factors."""
        plan, starts = start
        samples = text(33)
        with_scales, without = (
            polished(plan, starts, samples, steps=30, stretch_rate=rate)[1] for rate in (0.002, 0.0)
        )
        assert with_scales.before == without.before
        assert with_scales.after < without.after
        for name, trained in without.layers.items():
            assert torch.equal(trained.scales, starts[name].base.scales)


class TestModels:
    def test_conv1d_of_gpt2(self, tmp_path):
        plan, starts = begin(make_checkpoint(tmp_path / "model", "gpt2", initializer_range=0.1))
        assert any(name.endswith("c_attn") for name in starts)
        _, result = polished(plan, starts, text(33), steps=30)
        assert result.kept
        assert result.after < 0.9 * result.before

    def test_a_model_without_logits_is_matched_by_its_hidden_state(self, tmp_path):
        source = make_checkpoint(tmp_path / "model", "gpt2", model_class="GPT2Model", initializer_range=0.1)
        _, result = polished(*begin(source), text(33), steps=30)
        assert result.kept

    def test_an_encoder_and_a_decoder(self, tmp_path):
        _, result = polished(*begin(make_checkpoint(tmp_path / "model", "t5")), text(17))
        assert result.kept

    def test_layers_that_the_loss_does_not_see_get_no_gradient_and_stay(self, tmp_path):
        """The pooler of a BERT without a head: nothing that is compared comes from it."""
        source = make_checkpoint(tmp_path / "model", "bert", "float32", model_class="BertModel", initializer_range=0.1)
        plan, starts = begin(source)
        assert "pooler.dense" in starts
        _, result = polished(plan, starts, text(33), state=tmp_path / "state")
        assert result.kept
        pooler, low_rank = result.layers["pooler.dense"], starts["pooler.dense"].low_rank
        assert torch.equal(pooler.scales, starts["pooler.dense"].base.scales)
        torch.testing.assert_close(pooler.low_rank.B @ pooler.low_rank.A, low_rank.B @ low_rank.A, rtol=0, atol=1e-5)


class TestEnd:
    def test_it_stops_when_half_of_the_steps_have_improved_nothing(self, start, monkeypatch):
        monkeypatch.setattr("qinit.train.polish.EVALUATE_EVERY", 2)
        events, result = polished(*start, learning_rate=30.0, steps=20)
        assert not result.kept
        assert result.layers == {}
        assert result.steps == events[-1].step == 10

    def test_a_loss_that_is_no_number_ends_it_and_the_best_is_kept(self, start, monkeypatch):
        monkeypatch.setattr("qinit.train.polish.EVALUATE_EVERY", 2)
        trained = []

        def spoilt(*arguments):
            found = divergence(*arguments)
            if torch.is_grad_enabled():
                trained.append(1)
            return found * math.nan if torch.is_grad_enabled() and len(trained) == 6 else found

        monkeypatch.setattr("qinit.train.polish.divergence", spoilt)
        events, result = polished(*start, steps=100)
        assert result.steps == events[-1].step == 5
        assert result.kept
        for layer in result.layers.values():
            assert all(bool(t.isfinite().all()) for t in (layer.low_rank.B, layer.low_rank.A, layer.scales))

    def test_a_start_that_is_no_number_is_refused(self, start):
        plan, starts = start
        broken = {name: replace(each, base=each.base * math.nan) for name, each in dense(starts).items()}
        _, result = polished(plan, broken)
        assert (result.kept, result.steps, result.layers) == (False, 0, {})

    def test_two_samples_do_and_fewer_are_an_error(self, start):
        assert polished(*start, text(2), steps=2)[1].steps == 2
        with pytest.raises(CalibrationError, match="1 samples, at least 2 are needed"):
            polished(*start, text(1))


class TestGoingOn:
    """Broken off at any step and gone on with, it comes to the same bits."""

    @pytest.fixture(autouse=True)
    def often(self, monkeypatch):
        monkeypatch.setattr("qinit.train.polish.EVALUATE_EVERY", 4)

    @pytest.fixture(scope="class")
    def whole(self, start):
        """The result of a polish that nothing happened to."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qinit.train.polish.EVALUATE_EVERY", 4)
            return polished(*start, text(17), steps=12)[1]

    @pytest.mark.parametrize("breaks", [(4,), (6,), (2,), (12,), (5, 9), (4, 4, 4)])
    def test_with_the_same_bits(self, start, whole, tmp_path, breaks):
        plan, starts = start
        lessons = taught(plan, text(17), tmp_path)
        options = {"steps": 12, "seed": 0, "batch_size": 4, "state": tmp_path / "state"}
        begun = []
        for last in breaks:
            with student_of(plan, starts, CPU) as student:
                for event in (events := polish(student, lessons, text(17), **options)):
                    begun.append(event.step)
                    if event.step >= last:
                        events.close()
        with student_of(plan, starts, CPU) as student:
            result, events = exhausted(polish(student, lessons, text(17), **options))
        assert events[0].step == max(breaks) - max(breaks) % 4
        assert events[0].loss == events[0].held_out
        assert same(result, whole)
        assert (result.steps, result.before, result.after) == (whole.steps, whole.before, whole.after)

    def test_what_had_stopped_has_stopped(self, start, tmp_path, monkeypatch):
        monkeypatch.setattr("qinit.train.polish.MOST_EVALUATIONS", 1000)
        plan, starts = start
        lessons = taught(plan, text(), tmp_path)
        results = []
        for _ in range(2):
            with student_of(plan, starts, CPU) as student:
                options = {"steps": 1000, "seed": 0, "learning_rate": 30.0, "state": tmp_path / "state"}
                results.append(exhausted(polish(student, lessons, text(), **options)))
        (first, _), (second, again) = results
        assert not second.kept
        assert (first.steps, first.before) == (second.steps, second.before)
        assert [event.step for event in again] == [first.steps]

    def test_a_damaged_state_starts_anew(self, start, tmp_path):
        plan, starts = start
        lessons = taught(plan, text(), tmp_path)
        (tmp_path / "state").write_bytes(b"x" * 99)
        with student_of(plan, starts, CPU) as student:
            _, events = exhausted(polish(student, lessons, text(), steps=2, seed=0, state=tmp_path / "state"))
        assert [event.step for event in events] == [0, 1, 2]


@pytest.mark.parametrize("free", [0, 1 << 40])
def test_activations_are_computed_again_only_where_they_would_not_fit(start, monkeypatch, free):
    """And the numbers are the same."""
    monkeypatch.setattr("qinit.train.polish.free_memory", lambda device: free)
    asked = []
    monkeypatch.setattr("qinit.train.polish.enable_checkpointing", asked.append)
    _, result = polished(*start, text(17), steps=2)
    assert bool(asked) is (free == 0)
    monkeypatch.undo()
    assert result.after == polished(*start, text(17), steps=2)[1].after


def test_the_cost():
    assert polish_flops(1000, 50, 3) == 1_200_000


def test_what_calibration_has_not_seen_is_held_out(start, monkeypatch):
    held_out = []
    loss = qinit.train.polish._Text.loss
    monkeypatch.setattr(
        "qinit.train.polish._Text.loss", lambda text, rows: held_out.append(list(rows)) or loss(text, rows)
    )
    for unseen in ({5, 9, 11, 30, 31, 32}, {7}, ()):
        polished(*start, text(33), steps=1, unseen=unseen)
    assert set(held_out[0]) < {5, 9, 11, 30, 31, 32}
    assert len(held_out[0]) == len(held_out[-1]) == 33 // qinit.train.polish.HELD_OUT
    assert held_out[2] == [7]
