import pytest
import torch

from qinit.errors import OutputError, RecipeError, TargetError
from qinit.events import Done
from qinit.merge.plan import plan_merge
from qinit.merge.requantize import recipe_for, requantize
from qinit.merge.run import Merged, merge
from qinit.source.checkpoint import Checkpoint
from tests.helpers import names, quantize, weights_of
from tests.models import make_reader
from tests.stock import load_base

IDS = torch.arange(3, 43).view(2, 20)
TEXT = {"calibration": "random", "calibration_samples": 8, "calibration_length": 32}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("requantize")
    quantize(make_reader(place / "source", initializer_range=0.1), place / "run", bits=3, group_size=32, **TEXT)
    return place / "run"


def test_it_is_packed_has_no_adapter_and_says_what_it_costs(run, tmp_path):
    plan = plan_merge(run)
    recipe = recipe_for(plan, 8, device="cpu")
    assert (recipe.calibration, recipe.calibration_samples, recipe.group_size) == ("random", 8, 32)
    *_, last = requantize(plan, recipe, tmp_path / "out", command="qinit merge")
    assert isinstance(last, Merged)
    found = last.report.requantized
    assert (found["bits"], found["format"]) == (8, "gptq")
    assert 0 < found["error"] < 0.02
    assert 0 <= found["check"]["kl"] < 0.01
    assert names(tmp_path) == ["out"]
    assert "eqft_init" not in names(tmp_path / "out")
    kinds = {name.rpartition(".")[2] for name in Checkpoint.open(tmp_path / "out", quantized=True).tensors}
    assert {"qweight", "qzeros", "scales", "g_idx"} <= kinds
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    list(merge(plan, tmp_path / "whole"))
    with torch.no_grad():
        dense, packed = (load_base(tmp_path / name)(input_ids=IDS).logits for name in ("whole", "out"))
    assert (packed - dense).norm() < 0.05 * dense.norm()


def test_it_goes_on_where_it_was_broken_off_in_either_step(run, tmp_path):
    plan = plan_merge(run)
    recipe, out = recipe_for(plan, 4, device="cpu").model_copy(update={"check": False}), tmp_path / "out"
    *_, whole = requantize(plan, recipe, tmp_path / "undisturbed")
    for number, left in ((5, ["..out.merged.partial"]), (28, [".out.merged", ".out.partial"])):
        events = requantize(plan, recipe, out)
        for event in events:
            number -= isinstance(event, Done)
            if not number:
                events.close()
        assert names(tmp_path) == [*left, "undisturbed"]
    *_, last = requantize(plan, recipe, out)
    assert weights_of(out) == weights_of(tmp_path / "undisturbed")
    assert last.report.merged == whole.report.merged
    assert names(tmp_path) == ["out", "undisturbed"]


def test_bad_input_ends_before_anything_is_written(run, tmp_path):
    plan = plan_merge(run)
    with pytest.raises(RecipeError, match="bits: method eqft offers 2, 3, 4 or 8, found 5"):
        recipe_for(plan, 5)
    (tmp_path / ".out.merged").mkdir()
    (tmp_path / ".out.merged/mine").write_text("x")
    with pytest.raises(OutputError, match="is not the merge of these; remove it"):
        list(requantize(plan, recipe_for(plan, 4, device="cpu"), tmp_path / "out"))
    assert names(tmp_path) == [".out.merged"]


def test_where_quantizing_ends_in_an_error_nothing_is_left(run, tmp_path):
    recipe = recipe_for(plan_merge(run), 4, device="cpu").model_copy(update={"target_modules": "gone"})
    with pytest.raises(TargetError, match="no linear module is named 'gone'"):
        list(requantize(plan_merge(run), recipe, tmp_path / "out"))
    assert names(tmp_path) == []
