"""Layers that are slices of one tensor, as the experts of a mixture are."""

from dataclasses import replace
from shutil import rmtree

import pytest
import torch
from safetensors.torch import load_file

from qinit.events import Finished, Resumed, Working
from qinit.files.tensors import slice_name
from qinit.formats import FORMATS
from qinit.grids import GRIDS
from qinit.plan.parts import LayerPlan
from qinit.planner.make import make_plan
from qinit.recipe import make_recipe
from qinit.runner.again import polish_run
from qinit.runner.run import run
from qinit.solver.solve import solve
from qinit.solver.spec import seed_of
from qinit.source.targets import LinearModule, Target
from qinit.verification.findings import Finding
from qinit.verification.verify import verify
from tests.broken_off import RANDOM, break_off, finish, result_in
from tests.helpers import edit_tensors, quantize, weights_of
from tests.models import make_checkpoint

SHORT = {"calibration": "random", "format": "dense", "group_size": 32, "device": "cpu"}
EXPERTS, WIDTH, HIDDEN = 4, 64, 32
STACKED = "model.layers.0.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A model whose experts are saved as one tensor [expert, out, in], as transformers has them in memory."""
    from safetensors.torch import save_file

    source = make_checkpoint(tmp_path_factory.mktemp("mixture") / "m")
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    tensors[STACKED] = torch.randn(EXPERTS, WIDTH, HIDDEN, generator=generator).bfloat16()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


@pytest.fixture
def plan(mixture):
    """The plan of that model, with all experts but the second."""
    recipe = make_recipe(model=str(mixture), rank=4, bits=3, calibration="none", format="dense", max_shard_size="60KB")
    plan = make_plan(recipe, mixture, "mixture")
    layers = list(plan.layers)
    for index, tensor in enumerate(plan.checkpoint.tensors[STACKED].slices()):
        if index != 1:
            target = Target(LinearModule(f"model.layers.0.mlp.experts.{index}.down_proj", WIDTH, HIDDEN, False), tensor)
            specs = tuple(FORMATS["dense"].specs(target, 3, HIDDEN))
            layers.append(LayerPlan(target, 3, HIDDEN, 4, None, specs))
    return replace(plan, layers=tuple(layers))


def test_every_slice_is_solved_for_itself_and_written_to_its_place(plan, mixture, tmp_path):
    events = list(run(plan, tmp_path / "out"))
    before, after = load_file(mixture / "model.safetensors"), {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        after |= load_file(file)
    assert after.keys() == before.keys()
    assert after[STACKED].shape == before[STACKED].shape
    assert torch.equal(after[STACKED][1], before[STACKED][1])  # no layer of the plan: copied
    for index in (0, 2, 3):
        name = f"model.layers.0.mlp.experts.{index}.down_proj"
        layer = next(layer for layer in plan.layers if layer.target.name == name)
        solution = solve(before[STACKED][index].float(), plan.layer_spec(layer), seed_of(name, 0))
        values = GRIDS["int"].dequantize(solution.quantized).bfloat16()
        assert torch.equal(after[STACKED][index], values)
    adapter = load_file(tmp_path / "out/eqft_init/adapter_model.safetensors")
    assert sum(".experts." in name for name in adapter) == 6
    begun = [event.name for event in events if isinstance(event, Working)]
    assert [name for name in begun if STACKED in name] == [slice_name(STACKED, i) for i in range(EXPERTS)]
    report = events[-1].report
    assert sum(".experts." in row.name for row in report.layers) == 3
    assert plan.base_bytes == plan.bytes_before


def test_a_run_that_is_broken_off_among_the_slices_goes_on_with_the_same_bytes(plan, tmp_path):
    *_, last = run(plan, tmp_path / "whole")
    assert isinstance(last, Finished)
    events = run(plan, tmp_path / "out")
    while getattr(next(events), "name", "") != slice_name(STACKED, 2):
        pass
    events.close()
    resumed, *_ = run(plan, tmp_path / "out")
    assert isinstance(resumed, Resumed)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("family", "after", "options"),
    [
        ("qwen3_moe", 6, {}),  # among the experts of the first block
        ("gpt_oss", 13, {"calibration_mode": "parallel"}),  # in the second block
        ("granitemoe", 7, {"polish": 2, "calibration_samples": 16}),
        ("llama4", 3, {"calibration": "none"}),
    ],
)
def test_a_mixture_that_is_broken_off_goes_on_with_the_same_bytes(family, after, options, tmp_path):
    source = make_checkpoint(tmp_path / "m", family)
    options = {**RANDOM, "format": "dense", "group_size": 32, **options}
    finish(source, tmp_path / "out", **options)
    whole = result_in(tmp_path / "out")
    rmtree(tmp_path / "out")
    break_off(source, tmp_path / "out", after, **options)
    resumed, *_ = finish(source, tmp_path / "out", **options)
    assert isinstance(resumed, Resumed)
    assert result_in(tmp_path / "out") == whole


def test_experts_that_see_nothing_or_little_are_counted(tmp_path):
    source = make_checkpoint(tmp_path / "m", "qwen3_moe", num_experts=16, num_experts_per_tok=1)
    report = quantize(source, tmp_path / "out", calibration_length=4, calibration_samples=2, **SHORT)
    unseen = {row.name.rsplit("[")[1] + row.name[:15] for row in report.layers if row.tokens is None}
    assert unseen
    assert f"{len(unseen)} of 32 experts saw no token of the calibration text, so solved without data" in report.notes
    assert any("saw fewer tokens than they have inputs" in note for note in report.notes)
    assert all(row.error < row.error_start for row in report.layers)
    assert not any("never reached" in note for note in report.notes)


def test_a_finished_mixture_is_polished_further_and_its_experts_stay(tmp_path):
    source, out = make_checkpoint(tmp_path / "m", "qwen3_moe"), tmp_path / "out"
    before = quantize(source, out, calibration_samples=32, calibration_length=16, **SHORT)
    adapter = load_file(out / "eqft_init/adapter_model.safetensors")
    *_, last = polish_run(out, steps=3, check=False)
    assert isinstance(last, Finished)
    after = load_file(out / "eqft_init/adapter_model.safetensors")
    changed = {name for name in adapter if not torch.equal(adapter[name], after[name])}
    assert changed == {name for name in adapter if ".experts." not in name}
    assert [(r.name, r.error) for r in before.layers if r.name.endswith("]")] == [
        (r.name, r.error) for r in last.report.layers if r.name.endswith("]")
    ]
    findings = [event for event in verify(out, source) if isinstance(event, Finding)]
    assert not findings


def test_a_change_in_one_expert_is_found_by_verify(tmp_path):
    source, out = make_checkpoint(tmp_path / "m", "gpt_oss"), tmp_path / "out"
    quantize(source, out, calibration="none", format="dense")
    assert not [event for event in verify(out, source) if isinstance(event, Finding)]

    def change(tensors):
        tensors["model.layers.1.mlp.experts.down_proj"][2] += 0.5

    edit_tensors(out / "model.safetensors", change)
    found = [str(event) for event in verify(out, source) if isinstance(event, Finding)]
    assert any("model.layers.1.mlp.experts.down_proj[2]: error_start against the source" in text for text in found)
    assert not any("down_proj[1]" in text for text in found)


def test_all_experts_of_a_parameter_have_one_rank_and_widths_of_their_own(tmp_path):
    source = make_checkpoint(tmp_path / "m", "qwen3_moe")
    report = quantize(
        source,
        tmp_path / "out",
        target_bits=3.0,
        rank_budget="90KB",
        calibration_samples=8,
        calibration_length=32,
        **SHORT,
    )
    experts = [row for row in report.layers if row.name.endswith("]")]
    assert {row.rank for row in experts} == {4}
    assert len({row.bits for row in report.layers}) > 1
    assert not [event for event in verify(tmp_path / "out", source) if isinstance(event, Finding)]
