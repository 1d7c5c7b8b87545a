"""Gradients at the layers' outputs, block by block, against one pass back of the whole model as transformers has it."""

import pytest
import torch

from qinit.calibration import backward as module
from qinit.calibration.backward import backward
from qinit.calibration.probe import Probe, drawn
from qinit.events import Measuring
from qinit.stream.calls import NotStreamable
from qinit.stream.feeding import inputs_of
from tests.helpers import calibrated_plan, exhausted, padded, random_samples
from tests.models import make_float32
from tests.traces import assert_close, oriented, stock

CPU = torch.device("cpu")
LENGTHS = [12, 3, 7, 12, 9]


class Sums(Probe):
    """Adds up g' x for each layer: the gradient of its weight [out, in]; `prepared` is what was asked for before."""

    def __init__(self, plan, samples):
        super().__init__(plan, samples, CPU)
        self.gradients, self.tokens, self.prepared = {}, {}, []

    def prepare(self, part, run):
        assert not torch.is_grad_enabled()
        modules = part.modules
        assert modules.keys() == {layer.target.name for layer in part.layers}
        self.prepared.append(list(modules))
        if modules:
            for batch in self.batches:
                run(batch)  # a pass in front of the pass back changes nothing

    def add(self, name, x, gradient):
        assert len(x) == len(gradient)
        self.gradients[name] = self.gradients.get(name, 0) + gradient.T @ x
        self.tokens[name] = self.tokens.get(name, 0) + len(x)


def expected(plan, samples):
    """The same by autograd on the stock model, with labels drawn in the same order."""
    model = stock(plan)
    mask = torch.ones_like(samples.tokens, dtype=torch.bool) if samples.mask is None else samples.mask
    output = model(**inputs_of(model, samples.tokens, None if samples.mask is None else mask.long()))
    rows = output.logits[mask].log_softmax(-1)
    labels = drawn(rows.detach(), torch.Generator().manual_seed(plan.recipe.seed))
    (-rows.gather(1, labels[:, None]).sum()).backward()
    return {
        layer.target.name: oriented(model.get_submodule(layer.target.name).weight.grad, layer)
        for layer in plan.quantized
    }


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "gemma2", "bert", "t5", "bart"])
def test_they_are_those_of_the_whole_model(family, mask, tmp_path):
    plan, samples = calibrated_plan(make_float32(tmp_path / family, family)), random_samples(5)
    samples = padded(samples, LENGTHS) if mask else samples
    wanted = expected(plan, samples)
    probe, events = exhausted(backward(lambda: Sums(plan, samples), tmp_path))
    assert all(isinstance(event, Measuring) for event in events)
    assert events[0].blocks == (4 if family in ("t5", "bart") else 2)
    assert probe.gradients.keys() == {layer.target.name for layer in plan.quantized}
    assert set(probe.tokens.values()) == {samples.count}
    for name, gradient in probe.gradients.items():
        assert_close(gradient, wanted[name], 1e-3)
    assert list(tmp_path.iterdir()) == [tmp_path / family]


def test_layers_are_prepared_before_the_pass_back_reaches_them_the_last_block_first(tmp_path):
    plan = calibrated_plan(make_float32(tmp_path / "bert", "bert"))
    probe, events = exhausted(backward(lambda: Sums(plan, random_samples(3)), tmp_path))
    blocks = [[name for name in probe.layers if f".layer.{index}." in name] for index in (1, 0)]
    assert probe.prepared == [["cls.predictions.transform.dense"], *blocks]
    assert [event.block for event in events] == [0, 1, 0]
    assert [list(event.layers) for event in events[1:]] == blocks


def test_a_model_that_does_not_run_in_blocks_starts_anew_as_a_whole(llama, monkeypatch):
    plan, samples, made = calibrated_plan(llama), random_samples(4), []

    def make():
        made.append(Sums(plan, samples))
        return made[-1]

    def refuse(blocks, probe, scratch):
        probe.gradients["half"] = torch.zeros(1)
        raise NotStreamable
        yield

    streamed, _ = exhausted(backward(lambda: Sums(plan, samples), None))
    monkeypatch.setattr(module, "_streamed", refuse)
    probe, events = exhausted(backward(make, None))
    assert probe is made[1]
    assert len(made) == 2
    assert [event.blocks for event in events] == [1]
    assert probe.gradients.keys() == streamed.gradients.keys()
    for name, gradient in probe.gradients.items():
        assert_close(gradient, streamed.gradients[name], 1e-3)
