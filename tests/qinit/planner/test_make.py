import pytest

from qinit.errors import CalibrationError, RecipeError, TargetError
from qinit.files.tensors import StoredTensor
from qinit.planner import auto as choice
from qinit.planner import nominal
from qinit.planner.make import make_plan
from qinit.recipe import make_recipe
from qinit.solver.methods import CALIBRATED, METHODS
from tests.helpers import plan_of
from tests.models import make_bert, make_checkpoint, make_reader, words


def test_planning_reads_no_weights(tiny_llama, monkeypatch):
    def refuse(*_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(StoredTensor, "read", refuse)
    monkeypatch.setattr(StoredTensor, "chunks", refuse)
    assert len(plan_of(tiny_llama).quantized) == 14


def test_shapes_that_gptq_cannot_hold_are_kept_with_the_reason(tmp_path):
    directory = make_checkpoint(tmp_path / "m", intermediate_size=80)  # gate, up: 80 outputs; down: 80 inputs
    plan = plan_of(directory)
    kept = {layer.target.name: layer.kept for layer in plan.layers if layer.kept}
    assert kept["model.layers.0.mlp.up_proj"] == "80 x 64 is not divisible by 32"
    assert len(kept) == 6
    assert plan.notes == (
        "4 modules named gate_proj and up_proj stay as they are: 80 x 64 is not divisible by 32",
        "2 modules named down_proj stay as they are: 64 x 80 is not divisible by 32",
    )
    assert {tensor.name for tensor in plan.copied} >= {name + ".weight" for name in kept}
    assert not any(layer.kept for layer in plan_of(directory, format="dense").layers)


def test_inputs_that_the_group_size_does_not_divide_are_kept_for_gptq(tmp_path):
    plan = plan_of(make_checkpoint(tmp_path / "m", intermediate_size=96))
    kept = [layer for layer in plan.layers if layer.kept]
    assert [layer.target.name for layer in kept] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert kept[0].kept == "96 inputs are not divisible by the group size 64"


def test_a_model_that_the_format_cannot_hold_at_all_is_refused_with_the_way_out(tmp_path):
    directory = make_checkpoint(tmp_path / "m", intermediate_size=80)
    with pytest.raises(TargetError, match=r"can hold none of the 6 chosen layers .* use --format dense"):
        plan_of(directory, target_modules="gate_proj,up_proj,down_proj")


def test_a_rank_above_a_matrix_is_lowered_for_that_layer_and_said(tiny_llama):
    plan = plan_of(tiny_llama, rank=48)
    ranks = {layer.target.name.rsplit(".", 1)[-1]: layer.rank for layer in plan.layers}
    assert ranks == {
        **dict.fromkeys(("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 48),
        **dict.fromkeys(("k_proj", "v_proj"), 32),
    }
    assert plan.notes[0] == ("model.layers.0.self_attn.k_proj: rank lowered from 48 to 32, all that its shape allows")


def test_a_group_longer_than_a_row_is_the_row(tiny_llama):
    plan = plan_of(tiny_llama, format="dense", group_size=10**12)  # would be padded to terabytes
    assert {layer.group_size for layer in plan.layers} == {64, 128}


class TestAuto:
    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch):
        """A machine with 10 GB free, whatever this one is doing."""
        monkeypatch.setattr(choice, "free_memory", lambda device: 10**10)

    def test_a_small_language_model_writes_its_own_text(self, tiny_llama):
        plan = plan_of(tiny_llama, calibration="auto")
        assert plan.recipe.calibration == "self"
        (note,) = plan.notes
        assert note.startswith("calibration self: on text that the model writes itself, 128 samples of 128 tokens")
        assert plan.layer_spec(plan.layers[0]).method == CALIBRATED["eqft"]

    def test_what_was_chosen_is_asked_for_the_next_time(self, tiny_llama):
        plan = plan_of(tiny_llama, calibration="auto", rounding="nearest", polish=2)
        again = make_plan(make_recipe(**plan.recipe.model_dump()), tiny_llama, "name")
        assert again.recipe == plan.recipe
        assert again.notes == ()

    def test_what_takes_long_is_done_on_less_and_the_recipe_has_how_much(self, tiny_reader, monkeypatch):
        monkeypatch.setitem(nominal.SPEED, "cpu", 1e6)
        plan = plan_of(tiny_reader, calibration="auto")
        assert (plan.recipe.calibration, plan.recipe.calibration_samples) == ("text", 32)
        assert plan.notes[0].startswith("calibration text: on text that qinit brings, 32 samples of 128 tokens (4096)")
        assert "writes itself would take" in plan.notes[0]
        assert plan.layer_spec(plan.layers[0]).method == CALIBRATED["eqft"]

    def test_at_four_bits_it_is_not_done_unasked(self, tiny_reader, monkeypatch):
        monkeypatch.setitem(nominal.SPEED, "cpu", 1e6)
        plan = plan_of(tiny_reader, calibration="auto", bits=4)
        assert (plan.recipe.calibration, plan.recipe.calibration_samples) == ("none", 128)
        assert plan.notes[0].startswith("no calibration: 128 samples of text that the model writes itself would take")
        assert plan.layer_spec(plan.layers[0]).method == METHODS["eqft"]

    def test_a_full_machine_writes_no_text(self, tiny_reader, monkeypatch):
        monkeypatch.setattr(choice, "free_memory", lambda device: 10**5)
        plan = plan_of(tiny_reader, calibration="auto")
        assert plan.recipe.calibration == "text"
        assert "writing its own text takes 0.0 GB of the 0.0 GB" in plan.notes[0]

    def test_an_encoder_reads_text(self, tmp_path):
        plan = plan_of(make_bert(tmp_path / "bert"), calibration="auto", format="dense")
        assert plan.recipe.calibration == "text"
        assert plan.notes[0].startswith("calibration text: on text that qinit brings, 128 samples of 32 tokens (4096)")

    @pytest.mark.parametrize("method", ["qlora", "loftq", "qpissa"])
    def test_a_method_that_takes_none_gets_none_without_a_word(self, tiny_llama, method):
        plan = plan_of(tiny_llama, calibration="auto", method=method, format="dense")
        assert (plan.recipe.calibration, plan.notes) == ("none", ())

    @pytest.mark.parametrize("method", ["lqer", "qera", "eora", "cloq", "srr", "lq-lora"])
    def test_a_method_that_needs_it_gets_some_at_any_width(self, tiny_reader, monkeypatch, method):
        monkeypatch.setitem(nominal.SPEED, "cpu", 1e6)
        plan = plan_of(tiny_reader, calibration="auto", method=method, format="dense", bits=4)
        assert plan.recipe.calibrated

    @pytest.mark.parametrize("asked", [{"rounding": "gptq"}, {"act_order": True}, {"polish": 3}])
    def test_what_needs_it_is_refused_where_there_is_none(self, tiny_reader, monkeypatch, asked):
        monkeypatch.setitem(nominal.SPEED, "cpu", 1e6)
        with pytest.raises(RecipeError, match=f"{next(iter(asked))}: needs calibration, and there is none: 128 sam"):
            plan_of(tiny_reader, calibration="auto", bits=4, **asked)


class TestCalibration:
    def test_what_was_asked_for_is_not_weighed(self, tiny_llama, monkeypatch):
        monkeypatch.setattr("qinit.planner.make.choose", None)
        plan = plan_of(tiny_llama, calibration="random")
        assert (plan.recipe.calibration, plan.notes) == ("random", ())

    def test_planning_reads_no_weights(self, tmp_path, monkeypatch):
        directory = make_reader(tmp_path / "m")
        (tmp_path / "a.txt").write_text(words(4, 5))
        monkeypatch.setattr(StoredTensor, "read", None)
        for source in ("auto", "self", "text", "random", tmp_path / "a.txt"):
            assert len(plan_of(directory, calibration=str(source)).quantized) == 14

    def test_a_missing_file_is_an_error_of_the_plan(self, tiny_llama):
        with pytest.raises(CalibrationError, match=r"gone\.txt: no such file"):
            plan_of(tiny_llama, calibration="gone.txt")

    def test_a_text_field_is_for_rows(self, tmp_path):
        directory = make_reader(tmp_path / "m")
        for name in ("a.txt", "a.jsonl", "a.json"):
            (tmp_path / name).write_text('{"body": "w4 w5"}\n')
        with pytest.raises(CalibrationError, match=r"a\.txt: has no field 'body'; a text field is for JSONL"):
            plan_of(directory, calibration=str(tmp_path / "a.txt"), text_field="body")
        for name in ("a.jsonl", "a.json"):
            plan = plan_of(directory, calibration=str(tmp_path / name), text_field="body")
            assert plan.recipe.text_field == "body"
