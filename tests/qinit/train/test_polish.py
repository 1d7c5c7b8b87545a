import json
import math

import pytest
import torch

import qinit.train.polish
from qinit.errors import CalibrationError, CheckpointError
from qinit.events import Progress
from qinit.linalg.low_rank import LowRank
from qinit.text.samples import Samples
from qinit.train.polish import Polished, polish, polish_flops
from tests.helpers import exhausted
from tests.models import make_checkpoint
from tests.qinit.train.starts import CPU, linears, load, split, tokens


def run(directory, bases, factors, samples, **options):
    """Return the events and the result."""
    options = {"steps": 20, "device": CPU, "seed": 0, "batch_size": 4, **options}
    if isinstance(samples, torch.Tensor):
        samples = Samples(samples, None, "random")
    config = json.loads((directory / "config.json").read_text())
    result, events = exhausted(polish(directory, config, bases, factors, samples, **options))
    return events, result


def same(one, other):
    return all(torch.equal(one[n].A, other[n].A) and torch.equal(one[n].B, other[n].B) for n in one | other)


def test_the_held_out_loss_falls(start):
    events, result = run(*start, tokens(33), steps=60)
    assert result.kept
    assert result.after < 0.9 * result.before
    assert result.after == min(e.held_out for e in events if e.held_out is not None)


def test_the_generator_tells_of_the_start_and_every_step_and_returns_the_result(start):
    events, result = run(*start, tokens(), steps=25)
    assert isinstance(result, Polished)
    assert [e.step for e in events] == list(range(26))
    assert all(isinstance(e, Progress) and math.isfinite(e.loss) for e in events)
    assert [e.step for e in events if e.held_out is not None] == [0, 10, 20, 25]
    assert events[0].loss == events[0].held_out == result.before
    assert result.steps == 25


def test_every_factor_of_every_layer_moves_and_nothing_else(start):
    directory, bases, factors = start
    before = {name: (base.clone(), factors[name].B.clone(), factors[name].A.clone()) for name, base in bases.items()}
    weights = (directory / "model.safetensors").read_bytes()
    result = run(directory, bases, factors, tokens())[1]
    assert result.kept
    for name, (base, B, A) in before.items():
        assert torch.equal(bases[name], base)
        assert torch.equal(factors[name].B, B)  # the caller's own stay as they are
        assert torch.equal(factors[name].A, A)
        polished = result.factors[name]
        assert polished.B.shape == B.shape
        assert polished.A.shape == A.shape
        assert polished.B.dtype == polished.A.dtype == torch.float32
        assert not polished.B.requires_grad
        assert not torch.allclose(polished.B @ polished.A, B @ A, rtol=0, atol=1e-4 * float((B @ A).abs().max()))
    assert (directory / "model.safetensors").read_bytes() == weights


def test_the_start_is_the_model_with_its_adapters(start):
    """The loss at step 0, from the definition, on the sample that is held out."""
    directory, bases, factors = start
    text = tokens(5)
    before = run(directory, bases, factors, text, steps=0)[1].before
    teacher, student = load(directory), load(directory)
    for name, base in bases.items():
        student.get_submodule(name).weight.data = base + factors[name].B @ factors[name].A
    losses = []
    for sample in text:
        with torch.no_grad():
            t, s = (model(sample[None], output_hidden_states=True) for model in (teacher, student))
        p, q = t.logits[0].log_softmax(-1), s.logits[0].log_softmax(-1)
        error = (s.hidden_states[-1] - t.hidden_states[-1]).square().sum() / t.hidden_states[-1].square().sum()
        kl = (p.exp() * (p - q)).sum(-1).mean()
        losses.append(float(kl + qinit.train.polish.HIDDEN_WEIGHT * error))
    assert min(abs(before / loss - 1) for loss in losses) < 1e-3


def test_nothing_to_gain_gives_the_given_factors_back(tmp_path):
    directory = make_checkpoint(tmp_path / "model")
    bases = linears(load(directory))
    factors = {name: LowRank(torch.zeros(len(W), 4), torch.randn(4, W.shape[1])) for name, W in bases.items()}
    _, result = run(directory, bases, factors, tokens())
    assert not result.kept
    assert result.after == result.before
    assert all(
        result.factors[name].A is factors[name].A and result.factors[name].B is factors[name].B for name in bases
    )


def test_a_plain_lora_start_can_be_polished(start):
    directory, bases, factors = start
    zero = {name: LowRank(torch.zeros_like(f.B), torch.zeros_like(f.A)) for name, f in factors.items()}
    _, result = run(directory, bases, zero, tokens(33), steps=30)
    assert result.kept
    assert all(bool(f.B.any()) for f in result.factors.values())


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(start):
    results = [run(*start, tokens(33), seed=seed, steps=20)[1].factors for seed in (3, 3, 4)]
    assert not same(results[0], start[2])
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_how_the_product_is_shared_between_the_factors_does_not_matter(start):
    directory, bases, factors = start
    lopsided = {name: LowRank(f.B * 100, f.A / 100) for name, f in factors.items()}
    one, other = (run(directory, bases, start, tokens(), steps=10)[1] for start in (factors, lopsided))
    assert one.after == pytest.approx(other.after, rel=1e-2)


def test_padding_is_never_looked_at(start):
    mask = torch.ones(9, 16, dtype=torch.bool)
    mask[::2, 10:] = False
    results = []
    for filler in (0, 7):
        text = torch.where(mask, tokens(), filler)
        results.append(run(*start, Samples(text, mask, ""), steps=10)[1])
    assert results[0].before == results[1].before
    assert same(results[0].factors, results[1].factors)
    assert results[0].before != run(*start, tokens(), steps=10)[1].before


def test_conv1d_of_gpt2(tmp_path):
    directory = make_checkpoint(tmp_path / "model", "gpt2", initializer_range=0.1)
    bases, factors = split(load(directory))
    assert any(name.endswith("c_attn") for name in bases)
    _, result = run(directory, bases, factors, tokens(33), steps=30)
    assert result.kept
    assert result.after < 0.9 * result.before


def test_a_model_without_logits_is_matched_by_its_hidden_state(tmp_path):
    directory = make_checkpoint(tmp_path / "model", "gpt2", model_class="GPT2Model", initializer_range=0.1)
    bases, factors = split(load(directory, "AutoModel"))
    _, result = run(directory, bases, factors, tokens(33), steps=30)
    assert result.kept


def test_an_encoder_and_a_decoder(tmp_path):
    import transformers

    config = transformers.T5Config(
        vocab_size=256, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    bases, factors = split(load(tmp_path, "T5ForConditionalGeneration"))
    _, result = run(tmp_path, bases, factors, tokens(17))
    assert result.kept


def test_layers_without_adapters_and_adapters_without_quantized_layers(start):
    directory, bases, factors = start
    names = list(bases)
    some = {name: factors[name] for name in names[1:]}
    before = run(directory, bases, some, tokens(), steps=0)[1].before
    assert before > run(directory, bases, factors, tokens(), steps=0)[1].before
    kept = dict(factors)
    kept[names[0]] = LowRank(torch.zeros_like(factors[names[0]].B), factors[names[0]].A)
    _, result = run(directory, {name: bases[name] for name in names[1:]}, kept, tokens())
    assert result.before < before
    assert bool(result.factors[names[0]].B.any())


def test_bases_may_be_16_bit(start):
    directory, bases, factors = start
    halves = {name: base.bfloat16() for name, base in bases.items()}
    result = run(directory, halves, factors, tokens(), steps=10)[1]
    assert result.kept
    floats = {name: half.float() for name, half in halves.items()}
    assert same(result.factors, run(directory, floats, factors, tokens(), steps=10)[1].factors)


def test_it_stops_when_nothing_improves_any_more(start, monkeypatch):
    monkeypatch.setattr("qinit.train.polish.EVALUATE_EVERY", 1)
    events, result = run(*start, tokens(), learning_rate=30.0, steps=1000)
    assert not result.kept
    assert result.steps == events[-1].step == qinit.train.polish.PATIENCE
    assert same(result.factors, start[2])


def test_a_loss_that_is_no_number_ends_it_and_the_best_is_kept(start, monkeypatch):
    monkeypatch.setattr("qinit.train.polish.EVALUATE_EVERY", 2)
    terms, trained = qinit.train.polish._terms, []

    def spoilt(*arguments):
        result = terms(*arguments)
        if torch.is_grad_enabled():
            trained.append(1)
            if len(trained) == 6:
                result.kl = result.kl * math.nan
        return result

    monkeypatch.setattr("qinit.train.polish._terms", spoilt)
    events, result = run(*start, tokens(), steps=100)
    assert result.steps == events[-1].step == 5
    assert result.kept
    assert all(bool(f.B.isfinite().all() and f.A.isfinite().all()) for f in result.factors.values())


def test_a_start_that_is_no_number_is_refused(start):
    directory, bases, factors = start
    broken = {name: base * math.nan for name, base in bases.items()}
    result = run(directory, broken, factors, tokens())[1]
    assert (result.kept, result.steps) == (False, 0)
    assert same(result.factors, factors)


def test_two_samples_do_and_fewer_are_an_error(start):
    assert run(*start, tokens(2), steps=2)[1].steps == 2
    with pytest.raises(CalibrationError, match="1 samples, at least 2 are needed"):
        run(*start, tokens(1))


def test_a_source_that_cannot_be_loaded_is_an_error(tmp_path):
    directory = make_checkpoint(tmp_path / "model")
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be loaded for the polish"):
        run(directory, {}, {}, tokens())


def test_the_cost():
    assert polish_flops(1000, 50, 3) == 1_500_000
