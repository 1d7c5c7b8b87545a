"""Solving a layer is a function of its arguments, that any process can carry out."""

from dataclasses import replace

import pytest
import torch

from qinit.errors import CheckpointError
from qinit.linalg.low_rank import OutputMetric
from qinit.runner import layer as module
from qinit.runner.layer import read_weight, solve_layer
from tests.helpers import edit_tensors, gauss, plan_of
from tests.layers import statistics
from tests.models import make_checkpoint

CPU = torch.device("cpu")


def arguments(kind, llama, tmp_path):
    """A plan, its first layer, its weight and what it has seen."""
    if kind == "kept":
        source = make_checkpoint(tmp_path / "m", intermediate_size=80)
        plan = plan_of(source, target_modules="q_proj,up_proj")
        layer = next(layer for layer in plan.layers if layer.kept)
        return plan, layer, None, None
    options = {
        "calibration": "none" if kind == "data-free" else "random",
        "format": "dense" if kind != "seen" else "gptq",
    }
    plan = plan_of(llama, bits=3, target_modules="q_proj", use_rslora=True, lora_alpha=7.0, **options)
    layer = plan.layers[0]
    weight, seen = read_weight(layer, CPU), None
    if kind == "seen":
        metric = OutputMetric(gauss(3, 64), torch.ones(64))
        seen = replace(statistics(64, 64), drift=gauss(64, 64, scale=1e-4), output_metric=metric)
    return plan, layer, weight, seen


@pytest.mark.parametrize("kind", ["seen", "unreached", "data-free", "kept"])
def test_another_process_finds_the_same_to_the_last_bit(kind, llama, tmp_path, forks):
    given = arguments(kind, llama, tmp_path)
    tensors, row = solve_layer(*given)
    theirs, their_row = forks.call(solve_layer, *given)
    assert tensors.keys() == theirs.keys()
    assert all(torch.equal(tensors[name], theirs[name]) for name in tensors)
    assert replace(their_row, seconds=row.seconds) == row


@pytest.mark.parametrize("kind", ["seen", "unreached", "data-free"])
def test_its_arguments_and_the_random_state_are_left_alone(kind, llama, tmp_path):
    plan, layer, weight, seen = arguments(kind, llama, tmp_path)
    before = weight.clone(), None if seen is None else seen.hessian.clone(), torch.get_rng_state()
    solve_layer(plan, layer, weight, seen)
    assert torch.equal(weight, before[0])
    assert seen is None or torch.equal(seen.hessian, before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_what_comes_of_it_is_what_the_plan_has_announced_and_the_row_measures(llama, tmp_path):
    plan, layer, weight, seen = arguments("seen", llama, tmp_path)
    tensors, row = solve_layer(plan, layer, weight, seen)
    specs = [*layer.specs, *plan.adapter.specs(layer.target.module, layer.rank)]
    assert {(s.name, s.dtype, s.shape) for s in specs} == {(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    assert (row.name, row.shape, row.bits, row.rank, row.kept) == (layer.target.name, (64, 64), 3, 4, None)
    assert (row.tokens, row.bytes_before, row.bytes_after) == (seen.tokens, 2 * 64 * 64, layer.bytes_after)
    assert 0 < row.output_error < row.output_error_start
    assert 0 < row.error < row.error_start


def test_a_layer_that_was_never_reached_is_solved_as_without_calibration(llama, tmp_path):
    plan, layer, weight, seen = arguments("unreached", llama, tmp_path)
    without = plan_of(llama, bits=3, target_modules="q_proj", format="dense", use_rslora=True, lora_alpha=7.0)
    found, row = solve_layer(plan, layer, weight, seen)
    expected, _ = solve_layer(without, without.layers[0], weight, None)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert (row.tokens, row.output_error) == (None, None)


def test_a_layer_that_is_kept_gets_an_adapter_that_changes_nothing(llama, tmp_path):
    plan, layer, _, _ = arguments("kept", llama, tmp_path)
    tensors, row = solve_layer(plan, layer, None, None)
    assert tensors.keys() == set(plan.adapter.names(layer.target.module))
    assert plan.adapter.is_neutral(layer.target.module, tensors)
    assert (row.bits, row.group_size, row.error, row.kept) == (None, None, None, layer.kept)


def test_a_weight_that_cannot_be_decomposed_is_an_error_of_the_checkpoint(llama, tmp_path, monkeypatch):
    def fail(*_):
        raise torch.linalg.LinAlgError("did not converge")

    plan, layer, weight, seen = arguments("data-free", llama, tmp_path)
    monkeypatch.setattr(module, "solve", fail)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight"):
        solve_layer(plan, layer, weight, seen)


class TestReadWeight:
    def test_it_is_outputs_by_inputs_in_float32_whatever_is_stored(self, tmp_path):
        layer = plan_of(make_checkpoint(tmp_path / "m", "gpt2"), format="dense").layers[0]
        stored = layer.target.tensor.read()
        weight = read_weight(layer, CPU)
        assert (stored.dtype, stored.shape) == (torch.bfloat16, (64, 192))
        assert (weight.dtype, weight.shape) == (torch.float32, (192, 64))
        assert torch.equal(weight, stored.T.float())
        assert weight.is_contiguous()

    def test_what_is_no_number_is_an_error(self, tiny_llama):
        layer = plan_of(tiny_llama).layers[0]
        name = layer.target.tensor.name
        edit_tensors(tiny_llama / "model.safetensors", lambda tensors: tensors[name][3, 5].fill_(float("nan")))
        with pytest.raises(CheckpointError, match=rf"'{name}' holds 1 NaN or Inf"):
            read_weight(plan_of(tiny_llama).layers[0], CPU)
