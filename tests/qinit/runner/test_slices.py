"""Layers that are slices of one tensor, as the experts of a mixture are."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from qinit.events import Finished, Resumed, Working
from qinit.files.tensors import slice_name
from qinit.formats import FORMATS
from qinit.grids import GRIDS
from qinit.plan.plan import LayerPlan
from qinit.planner.make import make_plan
from qinit.recipe import make_recipe
from qinit.runner.run import run
from qinit.solver.solve import solve
from qinit.solver.spec import seed_of
from qinit.source.targets import LinearModule, Target
from tests.helpers import weights_of

EXPERTS, WIDTH, HIDDEN = 4, 64, 32
STACKED = "model.layers.0.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A model whose experts are saved as one tensor [expert, out, in], as transformers has them in memory."""
    from safetensors.torch import save_file

    from tests.models import make_checkpoint

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
