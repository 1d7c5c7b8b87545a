import pytest
import safetensors.torch
import torch

from qinit.errors import CalibrationError, RecipeError, TargetError
from qinit.files.tensors import StoredTensor
from qinit.planner import auto as choice
from qinit.planner.make import make_plan
from qinit.planner.memory import working_bytes
from qinit.recipe import make_recipe
from qinit.solver.methods import CALIBRATED, METHODS
from tests.helpers import plan_of, quantize
from tests.models import make_bert, make_checkpoint, make_reader, words


@pytest.mark.parametrize("format", ["gptq", "dense"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_plans_sizes_are_the_sizes_of_what_a_run_writes(tmp_path, tiny_llama, format, bits):
    plan = plan_of(tiny_llama, format=format, bits=bits)
    quantize(tiny_llama, tmp_path / "out", format=format, bits=bits)
    base = safetensors.torch.load_file(tmp_path / "out/model.safetensors")
    factors = safetensors.torch.load_file(tmp_path / "out/eqft_init/adapter_model.safetensors")
    assert plan.base_bytes == sum(tensor.nbytes for tensor in base.values())
    assert plan.adapter_bytes == sum(tensor.nbytes for tensor in factors.values())
    replaced = {name for name in base if name.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))}
    if format == "dense":
        replaced = {layer.target.tensor.name for layer in plan.quantized}
    weights = sum(layer.weights for layer in plan.quantized)
    assert plan.bits_per_weight == pytest.approx(8 * sum(base[name].nbytes for name in replaced) / weights)
    assert plan.grid_bits_per_weight == pytest.approx(bits + (16 + bits) / 64)


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
    assert len(plan.notes) == 6
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


def test_a_layer_is_solved_as_its_format_stores_it(tiny_llama):
    for format, storage in (("gptq", None), ("dense", torch.bfloat16)):
        plan = plan_of(tiny_llama, format=format, bits=3, iter=7)
        spec = plan.layer_spec(plan.layers[0])
        assert (spec.bits, spec.group_size, spec.rank, spec.iterations, spec.storage) == (3, 64, 4, 7, storage)


def test_working_memory_depends_on_the_largest_layer_only(tmp_path):
    two, four = (plan_of(make_checkpoint(tmp_path / str(n), num_hidden_layers=n)) for n in (2, 4))
    assert working_bytes(two) == working_bytes(four) > 0
    assert two.bytes_before < four.bytes_before


class TestAuto:
    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch):
        """A fast machine with 10 GB free, whatever this one is doing."""
        monkeypatch.setattr(choice, "measured_speed", lambda device: 1e11)
        monkeypatch.setattr(choice, "free_memory", lambda device: 10**10)

    def test_a_small_language_model_writes_its_own_text(self, tiny_llama):
        plan = plan_of(tiny_llama, calibration="auto")
        assert plan.recipe.calibration == "self"
        assert plan.notes == ("calibration self: on text that the model writes itself",)
        assert plan.layer_spec(plan.layers[0]).method == CALIBRATED["eqft"]

    def test_what_was_chosen_is_asked_for_the_next_time(self, tiny_llama):
        plan = plan_of(tiny_llama, calibration="auto", rounding="nearest", polish=2)
        again = make_plan(make_recipe(**plan.recipe.model_dump()), tiny_llama, "name")
        assert again.recipe == plan.recipe
        assert again.notes == ()

    def test_what_takes_long_is_not_done_unasked(self, tiny_llama, monkeypatch):
        monkeypatch.setitem(choice.NOMINAL_SPEED, "cpu", 1e6)
        plan = plan_of(tiny_llama, calibration="auto")
        assert plan.recipe.calibration == "none"
        assert plan.notes[0].startswith("no calibration: on the model's own text it would take about ")
        assert plan.layer_spec(plan.layers[0]).method == METHODS["eqft"]

    def test_a_full_machine_does_without(self, tiny_llama, monkeypatch):
        monkeypatch.setattr(choice, "free_memory", lambda device: 10**5)
        plan = plan_of(tiny_llama, calibration="auto")
        assert plan.recipe.calibration == "none"
        assert plan.notes[0].startswith("no calibration: writing its own text takes 0.0 GB of the 0.0 GB")

    def test_an_encoder_does_without(self, tmp_path):
        plan = plan_of(make_bert(tmp_path / "bert"), calibration="auto", format="dense")
        assert plan.recipe.calibration == "none"
        assert plan.notes == (
            "no calibration: the model writes no text of its own; give --calibration FILE to start closer",
        )

    @pytest.mark.parametrize("method", ["qlora", "loftq", "qpissa"])
    def test_a_method_that_takes_none_gets_none_without_a_word(self, tiny_llama, method):
        plan = plan_of(tiny_llama, calibration="auto", method=method, format="dense")
        assert (plan.recipe.calibration, plan.notes) == ("none", ())

    @pytest.mark.parametrize("method", ["lqer", "qera", "eora", "cloq", "srr", "lq-lora"])
    def test_a_method_that_needs_it_is_refused(self, tiny_llama, method):
        with pytest.raises(RecipeError, match=f"method {method} needs it; give --calibration self or a text file"):
            plan_of(tiny_llama, calibration="auto", method=method, format="dense")

    @pytest.mark.parametrize("asked", [{"rounding": "gptq"}, {"act_order": True}, {"polish": 3}])
    def test_what_needs_it_is_refused_where_there_is_none(self, tmp_path, asked):
        with pytest.raises(RecipeError, match=f"{next(iter(asked))}: needs calibration, and there is none: the model"):
            plan_of(make_bert(tmp_path / "bert"), calibration="auto", format="dense", **asked)


class TestCalibration:
    def test_what_was_asked_for_is_not_weighed(self, tiny_llama, monkeypatch):
        monkeypatch.setattr("qinit.planner.make.choose", None)
        plan = plan_of(tiny_llama, calibration="random")
        assert (plan.recipe.calibration, plan.notes) == ("random", ())

    def test_planning_reads_no_weights(self, tmp_path, monkeypatch):
        directory = make_reader(tmp_path / "m")
        (tmp_path / "a.txt").write_text(words(4, 5))
        monkeypatch.setattr(StoredTensor, "read", None)
        for source in ("auto", "self", "random", tmp_path / "a.txt"):
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

    def test_a_layer_without_data_is_solved_by_the_row_without_calibration(self, tiny_llama):
        plan = plan_of(tiny_llama, calibration="random", iter=9)
        spec = plan.data_free_spec(plan.layers[0])
        assert (spec.method, spec.iterations) == (METHODS["eqft"], METHODS["eqft"].iterations)
        assert (spec.bits, spec.group_size, spec.rank, spec.storage) == (2, 64, 4, None)
        assert plan.layer_spec(plan.layers[0]).iterations == 9

    def test_working_memory_grows_with_the_text_the_mode_and_the_widest_layer(self, tmp_path, tiny_llama, monkeypatch):
        monkeypatch.setattr("qinit.planner.memory.LOGITS_COPIES", 0)  # the pass back needs more than layers this small

        def needed(directory=tiny_llama, **options):
            samples = {"calibration": "random", "calibration_samples": 8, "calibration_length": 16}
            return working_bytes(plan_of(directory, **{**samples, **options}))

        plain = working_bytes(plan_of(tiny_llama))
        assert plain < needed(calibration_mode="parallel") < needed()
        # Float32 hidden states of two models, width 64.
        assert needed(calibration_samples=16) - needed() == 2 * 4 * 64 * 8 * 16
        assert needed(calibration_length=32) == needed(calibration_samples=16)
        assert needed(make_checkpoint(tmp_path / "wide", intermediate_size=256)) > needed()
        assert needed(make_checkpoint(tmp_path / "deep", num_hidden_layers=4)) == needed()

    def test_working_memory_counts_the_head_and_the_logits_of_the_pass_back(self, tmp_path):
        directory = make_checkpoint(tmp_path / "many-words", vocab_size=50_000)
        plan = plan_of(directory, calibration="random")
        assert working_bytes(plan) == 4 * 50_000 * 64 + 4 * 4 * 1024 * 50_000

    def test_working_memory_counts_what_needs_the_whole_model(self, tiny_llama):
        few = {"calibration_samples": 1, "calibration_length": 2}
        plan = plan_of(tiny_llama, calibration="random", **few)
        parameters, weights = plan.bytes_before // 2, sum(layer.weights for layer in plan.quantized)
        assert working_bytes(plan_of(tiny_llama, calibration="self", **few)) == max(
            working_bytes(plan), plan.bytes_before
        )
        polished = working_bytes(plan_of(tiny_llama, calibration="random", polish=1, **few))
        whole = 4 * parameters + 4 * weights + 5 * plan.adapter_bytes
        assert polished == max(working_bytes(plan), whole)
        fisher = working_bytes(plan_of(tiny_llama, calibration="random", method="lq-lora", format="dense", **few))
        assert fisher > 4 * parameters + 8 * weights

    def test_a_large_model_that_writes_its_own_text_is_in_memory_as_a_whole(self, tmp_path):
        directory = make_checkpoint(tmp_path / "deep", num_hidden_layers=12)
        few = {"calibration_samples": 1, "calibration_length": 2, "target_modules": "k_proj"}
        plan = plan_of(directory, calibration="self", **few)
        assert working_bytes(plan) == plan.bytes_before > working_bytes(plan_of(directory, calibration="random", **few))

    def test_sizes_do_not_depend_on_it(self, tiny_llama):
        plain, calibrated = plan_of(tiny_llama), plan_of(tiny_llama, calibration="random")
        assert (plain.base_bytes, plain.adapter_bytes) == (calibrated.base_bytes, calibrated.adapter_bytes)
