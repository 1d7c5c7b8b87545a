"""The metric of errors at the layers' outputs, against gradients of the whole model as transformers has it."""

import pytest
import torch

from qinit.calibration import backward, probe
from qinit.calibration.output_metric import DIRECTIONS, FLOOR, SHRINKAGE, output_metrics
from qinit.calibration.probe import drawn
from qinit.events import Measuring
from qinit.stream.calls import NotStreamable
from qinit.text.samples import Samples
from tests.helpers import calibrated_plan, exhausted, padded, random_samples
from tests.models import FAMILIES, OTHERS, make_float32
from tests.traces import stock

CPU = torch.device("cpu")
LENGTHS = [12, 3, 7, 12, 9]


def measured(plan, samples, **rest):
    found, seen = exhausted(output_metrics(plan, samples, CPU, **rest))
    assert all(isinstance(event, Measuring) for event in seen)
    return found


def whole(metric):
    """G as a matrix."""
    return metric.leading.T @ metric.leading + metric.rest.diag()


def moments(plan, samples):
    """E[g g'] of each layer by one backward pass of the whole model for every token drawn, mean diagonal 1."""
    model = stock(plan)
    gradients = {layer.target.name: [] for layer in plan.quantized}
    for name, found in gradients.items():

        def keep(_module, _arguments, output, found=found):
            output.register_hook(lambda gradient: found.append(gradient.flatten(0, -2)))

        model.get_submodule(name).register_forward_hook(keep)
    generator = torch.Generator().manual_seed(plan.recipe.seed)
    rows = model(input_ids=samples.tokens).logits.flatten(0, 1).log_softmax(-1)
    labels = drawn(rows.detach(), generator)
    (-rows.gather(1, labels[:, None]).sum()).backward()
    products = {name: torch.cat(found).T @ torch.cat(found) for name, found in gradients.items()}
    return {name: product / product.diagonal().mean() for name, product in products.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_it_is_the_second_moment_of_the_gradients(family, tmp_path):
    plan, samples = calibrated_plan(make_float32(tmp_path / family, family)), random_samples(4)
    found, expected = measured(plan, samples), moments(plan, samples)
    assert found.keys() == expected.keys()
    for name, metric in found.items():
        G = expected[name]
        power = G.diagonal()
        torch.testing.assert_close(whole(metric).diagonal(), (1 + SHRINKAGE) * power + FLOOR, rtol=1e-3, atol=1e-4)
        values, vectors = torch.linalg.eigh(G)
        kept = min(DIRECTIONS, len(G))
        assert metric.leading.shape == (kept, len(G))
        best = (vectors[:, -kept:] * values[-kept:]) @ vectors[:, -kept:].T
        torch.testing.assert_close(
            metric.leading.T @ metric.leading, best, rtol=0, atol=0.05 * float(values[-1]), msg=name
        )


def test_directions_are_kept_over_batches(tmp_path, monkeypatch):
    plan, samples = calibrated_plan(make_float32(tmp_path / "llama", "llama")), random_samples(8)
    at_once = measured(plan, samples)
    monkeypatch.setattr(probe, "GRADIENT_BATCH_TOKENS", 24)
    for name, metric in measured(plan, samples).items():
        # Other labels are drawn, so alike in the large only.
        one, other = whole(at_once[name]), whole(metric)
        assert float((one * other).sum()) > 0.8 * float(one.norm() * other.norm()), name


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_every_family_and_padding(family, tmp_path):
    plan = calibrated_plan(make_float32(tmp_path / family, family))
    samples = padded(random_samples(5), LENGTHS)
    for name, metric in measured(plan, samples).items():
        out = next(layer for layer in plan.quantized if layer.target.name == name).target.module.out_features
        assert metric.rest.shape == (out,)
        assert bool((metric.rest >= FLOOR).all())
        assert float(whole(metric).diagonal().mean()) == pytest.approx(1 + SHRINKAGE + FLOOR, rel=1e-3)


def test_padding_changes_nothing(tmp_path):
    plan, samples = calibrated_plan(make_float32(tmp_path / "llama", "llama")), random_samples(3)
    longer = Samples(
        torch.cat([samples.tokens, torch.zeros(3, 4, dtype=torch.long)], 1),
        torch.tensor([[True] * 12 + [False] * 4] * 3),
        samples.origin,
    )
    found, expected = measured(plan, longer), measured(plan, samples)
    assert found.keys() == expected.keys()
    for name, metric in found.items():
        torch.testing.assert_close(whole(metric), whole(expected[name]), rtol=1e-3, atol=1e-3)


def test_block_by_block_it_is_what_the_whole_model_gives(tmp_path, monkeypatch):
    plan, samples = calibrated_plan(make_float32(tmp_path / "llama", "llama")), random_samples(4)
    expected = measured(plan, samples, scratch=tmp_path)

    def refuse(*_):
        raise NotStreamable
        yield

    monkeypatch.setattr(backward, "_streamed", refuse)
    found = measured(plan, samples)
    assert found.keys() == expected.keys()
    for name, metric in found.items():
        torch.testing.assert_close(whole(metric), whole(expected[name]), rtol=1e-3, atol=1e-4)


def test_a_model_that_overflows_has_none(tmp_path):
    source = make_float32(tmp_path / "llama", "llama")
    plan, samples = calibrated_plan(source), random_samples(2)
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 3e38)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    assert measured(plan, samples) == {}
