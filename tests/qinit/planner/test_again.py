import shutil

import pytest

from qinit.errors import CheckpointError, RecipeError, ReportError
from qinit.planner.again import plan_again, polish_recipe, recipe_of
from qinit.recipe import make_recipe
from qinit.report.report import Report
from tests.helpers import edit_json, plan_of, quantize
from tests.models import make_checkpoint

FEW = {"calibration": "random", "calibration_samples": 8, "calibration_length": 32}


@pytest.fixture(scope="module")
def made(llama, tmp_path_factory):
    """A run of several widths and ranks; not to be changed."""
    out = tmp_path_factory.mktemp("made") / "run"
    quantize(llama, out, **FEW, target_bits=3.0, rank_budget="24KB", seed=3, format="gptq")
    return out


@pytest.fixture
def run(made, place):
    return shutil.copytree(made, place / "run")


def again(run, source, **options):
    report = Report.read(run)
    recipe = polish_recipe(recipe_of(report, run), **{"calibration": "random", **options})
    return plan_again(report, recipe, run, source)


class TestRecipe:
    def test_the_runs_own_text_unless_another_is_given(self):
        made_by = make_recipe(calibration="rows.jsonl", text_field="body", calibration_samples=7, seed=5, bits=3)
        found = polish_recipe(made_by, steps=9)
        own = ("calibration", "text_field", "calibration_samples", "calibration_length", "seed")
        assert [getattr(found, key) for key in own] == ["rows.jsonl", "body", 7, 512, 5]
        assert (found.polish, found.bits, found.device) == (9, 3, "auto")
        other = polish_recipe(made_by, calibration="text", calibration_length=64, seed=0, device="cpu", check=False)
        assert [getattr(other, key) for key in own] == ["text", None, 7, 64, 0]
        assert (other.polish, other.check) == (100, False)

    def test_text_that_qinit_brings_for_a_run_without_any(self):
        assert polish_recipe(make_recipe(calibration="none")).calibration == "text"
        assert polish_recipe(make_recipe(method="loftq", calibration="none", format="dense")).calibration == "text"

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"steps": 0}, "steps: expected at least 1, found 0"),
            ({"steps": 2**30}, "polish: .*found 1073741824"),
            ({"calibration": "none"}, "a polish needs text .*, found none"),
            ({"calibration": "auto"}, "a polish needs text .*, found auto"),
            ({"calibration_samples": 0}, "calibration_samples: .*found 0"),
            ({"device": "tpu"}, "device: expected auto, cpu"),
            ({"text_field": "body", "calibration": "self"}, "there is no field to name in calibration self"),
        ],
    )
    def test_what_is_refused(self, options, match):
        with pytest.raises(RecipeError, match=match):
            polish_recipe(make_recipe(calibration="random"), **options)

    def test_code_is_for_the_caller_to_allow(self, run):
        report = Report.read(run)
        report.recipe["trust_remote_code"] = True
        assert not recipe_of(report, run).trust_remote_code
        assert recipe_of(report, run, trust_remote_code=True).trust_remote_code
        report.recipe["bits_of_later"] = 5
        with pytest.raises(ReportError, match=r"qinit\.json: recipe: unknown recipe key 'bits_of_later'"):
            recipe_of(report, run)


class TestPlan:
    def test_the_layers_have_the_widths_and_ranks_of_the_report(self, run, tiny_llama):
        found = again(run, tiny_llama)
        rows = Report.read(run).layers
        assert len({row.bits for row in rows}) > 1
        assert len({row.rank for row in rows}) > 1
        for layer, row in zip(found.layers, rows, strict=True):
            assert (layer.target.name, layer.bits, layer.rank) == (row.name, row.bits, row.rank)
            assert (layer.group_size, layer.bytes_after) == (row.group_size, row.bytes_after)
        assert not found.pending
        assert sum(tensor.nbytes for tensor in found.base_specs) == Report.read(run).totals["base_bytes"]

    @pytest.mark.parametrize("options", [{}, {"format": "dense", "target_modules": "mlp.up_proj"}, {"rank": 48}])
    def test_it_is_the_plan_that_the_run_was_made_by(self, tmp_path, options):
        source = make_checkpoint(tmp_path / "m", intermediate_size=80)  # the packed format keeps some
        quantize(source, tmp_path / "run", **options)
        assert again(tmp_path / "run", source).layers == plan_of(source, **options).layers

    def test_another_model(self, run, tmp_path, tiny_llama):
        for name, change, match in (
            ("wide", {"hidden_size": 128}, r"bytes of weights: expected \d+, found \d+; give that one with --model"),
            ("qwen", {"family": "qwen2"}, "the class of the model: expected LlamaForCausalLM, found Qwen2ForCausalLM"),
        ):
            other = make_checkpoint(tmp_path / name, **change)
            with pytest.raises(CheckpointError, match=rf"{name}: is not the model that .*run was made from: {match}"):
                again(run, other)
        edit_json(run / "qinit.json", lambda raw: raw["layers"][2].update(name="model.layers.7.mlp.up_proj"))
        with pytest.raises(
            CheckpointError, match=r"the shape of model\.layers\.7\.mlp\.up_proj: expected .*, found none"
        ):
            again(run, tiny_llama)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"bits": None}, "has neither a width nor a reason"),
            ({"bytes_after": 5}, r"bytes_after: expected \d+, found 5; `qinit verify"),
        ],
    )
    def test_a_report_that_does_not_add_up(self, run, tiny_llama, change, match):
        edit_json(run / "qinit.json", lambda raw: raw["layers"][2].update(change))
        with pytest.raises(ReportError, match=match):
            again(run, tiny_llama)

    def test_nothing_to_polish(self, run, tiny_llama):
        def keep(raw):
            for layer in raw["layers"]:
                layer.update(kept="so")

        edit_json(run / "qinit.json", keep)
        with pytest.raises(ReportError, match="no layer is quantized"):
            again(run, tiny_llama)

    def test_text_is_looked_at_before_anything_is_done(self, run, tiny_llama):
        from qinit.errors import CalibrationError

        with pytest.raises(CalibrationError, match=r"gone\.txt: no such file"):
            again(run, tiny_llama, calibration="gone.txt")
