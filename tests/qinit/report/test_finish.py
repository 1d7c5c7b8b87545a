"""What goes into a run's directory beside its tensors."""

import json

import pytest

from qinit.files.manifest import MANIFEST_NAME, read_manifest
from qinit.report.averages import relative_error
from qinit.report.finish import complete, copy_companions, make_report, write_configurations
from qinit.report.report import LayerRow, Report
from tests.helpers import contents, plan_of
from tests.models import make_checkpoint
from tests.sensitivities import made_up, mixed_widths


def rows_of(plan, output=None):
    """Made-up rows for the layers of a plan, with an output error where one is given."""
    rows = []
    for number, layer in enumerate(plan.layers, 1):
        module = layer.target.module
        start, end = (None, None) if layer.kept else (0.04 * number, 0.02 * number)
        before, after = (None, None) if output is None or layer.kept else (2 * output, output)
        width = (None, None) if layer.kept else (layer.bits, layer.group_size)
        shape = (module.out_features, module.in_features)
        sizes = (layer.rank, layer.target.tensor.nbytes, layer.bytes_after)
        rows.append(
            LayerRow(layer.target.name, shape, *width, *sizes, start, end, (), 0.1, layer.kept, before, after, None)
        )
    return tuple(rows)


def report_of(plan, rows=None, calibration=None, notes=()):
    return make_report(
        plan,
        rows_of(plan) if rows is None else rows,
        calibration=calibration or {},
        notes=notes,
        command="qinit eqft <m>",
        seconds=1.23456,
        peak_memory_bytes=99,
    )


class TestReport:
    def test_its_totals_are_the_plan_s_sizes_and_the_rows_errors(self, tmp_path):
        plan = plan_of(make_checkpoint(tmp_path / "m", intermediate_size=80), name="org/model", bits=3)
        report = report_of(plan, notes=("found on the way",))
        totals = report.totals
        assert (totals["layers"], totals["layers_kept"]) == (8, 6)
        assert totals["quantized_weights"] == sum(layer.weights for layer in plan.layers if not layer.kept)
        assert (totals["base_bytes"], totals["adapter_bytes"]) == (plan.base_bytes, plan.adapter_bytes)
        assert totals["bits_per_weight"] == round(plan.bits_per_weight, 4)
        assert totals["error"] == pytest.approx(totals["error_start"] / 2)
        assert totals["error"] == relative_error(report.layers, "error")
        assert (totals["seconds"], totals["peak_memory_bytes"], totals["nominal_bits"]) == (1.235, 99, 3)
        assert not {"output_error", "calibration", "allocation"} & totals.keys()
        assert report.notes == (*plan.notes, "found on the way")
        assert report.source == {"model": "org/model", "revision": None, "class": "LlamaForCausalLM"}
        assert report.recipe == plan.recipe.model_dump()

    def test_outputs_and_calibration_are_there_where_they_were_measured(self, llama):
        plan = plan_of(llama)
        totals = report_of(plan, rows_of(plan, output=0.25), calibration={"text": "words", "tokens": 9}).totals
        assert totals["output_error"] == pytest.approx(0.25)
        assert totals["output_error_start"] == pytest.approx(0.5)
        assert totals["calibration"] == {"text": "words", "tokens": 9}

    def test_widths_by_a_rule_have_no_front_and_measured_ones_do(self, llama, tmp_path):
        by_rule = plan_of(llama, ratio=0.5, allocation="first")
        assert report_of(by_rule).totals["allocation"].keys() == {"allocation", "metric"}
        made_up(mixed_widths(llama)).write(tmp_path / "s.json")
        measured = mixed_widths(llama, sensitivity=str(tmp_path / "s.json"))
        found = report_of(measured).totals["allocation"]
        assert found["allocation"] == "sensitivity"
        assert found["front"] == measured.allocation.front
        assert found["chosen"] == measured.allocation.chosen


def completed(plan, run, out):
    """Write all that a run writes beside its tensors; returns its report."""
    write_configurations(plan, run, out)
    report = report_of(plan)
    complete(plan, report, run)
    return report


class TestComplete:
    @pytest.mark.parametrize("form", ["gptq", "dense"])
    def test_the_configuration_says_how_the_weights_are_packed_and_keeps_all_else(self, llama, tmp_path, form):
        plan = plan_of(llama, format=form)
        (tmp_path / "run/eqft_init").mkdir(parents=True)
        completed(plan, tmp_path / "run", tmp_path / "out")
        config = json.loads((tmp_path / "run/config.json").read_text())
        quantization = config.pop("quantization_config", None)
        assert config == plan.checkpoint.config
        assert (quantization is None) == (form == "dense")
        if quantization is not None:
            assert (quantization["bits"], quantization["group_size"]) == (2, 64)

    def test_the_adapter_names_the_place_that_the_run_goes_to(self, llama, tmp_path, monkeypatch):
        plan = plan_of(llama, rank=48)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "run/eqft_init").mkdir(parents=True)
        completed(plan, tmp_path / "run", tmp_path / "run/../out")
        adapter = json.loads((tmp_path / "run/eqft_init/adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == str(tmp_path / "out")
        assert adapter["r"] == 48
        assert adapter["rank_pattern"]["model.layers.1.self_attn.v_proj"] == 32

    def test_the_list_of_sums_is_last_and_has_every_file(self, llama, tmp_path):
        plan = plan_of(llama)
        (tmp_path / "run/eqft_init").mkdir(parents=True)
        (tmp_path / "run/model.safetensors").write_bytes(b"weights")
        report = completed(plan, tmp_path / "run", tmp_path / "out")
        files = contents(tmp_path / "run")
        assert read_manifest(tmp_path / "run").keys() == files.keys() - {MANIFEST_NAME}
        assert {"config.json", "qinit.json", "README.md", "eqft_init/adapter_config.json"} < files.keys()
        assert Report.read(tmp_path / "run").layers == report.layers

    def test_a_measurement_is_written_beside_the_run_that_it_chose_widths_for(self, llama, tmp_path):
        measurement = made_up(mixed_widths(llama))
        measurement.write(tmp_path / "s.json")
        plan = mixed_widths(llama, sensitivity=str(tmp_path / "s.json"))
        (tmp_path / "run/eqft_init").mkdir(parents=True)
        completed(plan, tmp_path / "run", tmp_path / "out")
        assert (tmp_path / "run/sensitivity.json").read_bytes() == (tmp_path / "s.json").read_bytes()


def test_companions_keep_their_folders(tiny_llama, tmp_path):
    (tiny_llama / "templates/deep").mkdir(parents=True)
    (tiny_llama / "templates/deep/tool.jinja").write_bytes(b"\xff\0")
    (tiny_llama / "tokenizer.json").write_text("{}")
    copy_companions(plan_of(tiny_llama), tmp_path / "run")
    assert contents(tmp_path / "run").keys() == {
        "generation_config.json",
        "templates/deep/tool.jinja",
        "tokenizer.json",
    }
    assert (tmp_path / "run/templates/deep/tool.jinja").read_bytes() == b"\xff\0"
