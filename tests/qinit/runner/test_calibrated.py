"""Runs with calibration: what is written is what the report says, the same every time, and better."""

import json
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from qinit.calibration.walk import OpenBlock, Walk
from qinit.errors import CalibrationError
from qinit.events import Done, Finished, Measuring, Noted, Sampling, Working
from qinit.planner.make import make_plan
from qinit.recipe import make_recipe
from qinit.runner.run import run
from qinit.solver.methods import CALIBRATED, METHODS
from qinit.stream.calls import NotStreamable
from tests.helpers import gauss, quantize, weights_of
from tests.models import make_checkpoint
from tests.stock import delta, dense_weight, load, lora_modules, relative

FEW = {"calibration": "random", "calibration_samples": 4, "calibration_length": 16, "iter": None}
MORE = {**FEW, "calibration_samples": 32, "calibration_length": 32}
POLISHED = {**MORE, "calibration_samples": 128, "calibration_mode": "parallel", "polish": 5}


def events_of(source, out, **options):
    return run(make_plan(make_recipe(**{"rank": 4, **FEW, **options}), source, "name"), out)


def source_weights(directory):
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    return {name.removesuffix(".weight"): tensor.float() for name, tensor in tensors.items()}


class TestLoading:
    @pytest.mark.parametrize("format", ["gptq", "dense"])
    @pytest.mark.parametrize("scaling", [{"symmetric": True}, {"use_rslora": True, "lora_alpha": 7.0}])
    def test_stock_loaders_get_the_errors_that_the_report_states(self, strong_llama, tmp_path, format, scaling):
        report = quantize(strong_llama, tmp_path / "out", format=format, **FEW, **scaling)
        modules, weights = lora_modules(load(tmp_path / "out")), source_weights(strong_llama)
        assert len(report.layers) == len(modules) == 14
        for row in report.layers:
            module, weight = modules[row.name], weights[row.name]
            base = dense_weight(module.base_layer)
            # gptqmodel unpacks in float16, 11 bits.
            assert relative(base, weight) == pytest.approx(row.error_start, rel=2e-3)
            assert relative(base + delta(module), weight) == pytest.approx(row.error, rel=2e-3)
            assert row.output_error < row.output_error_start

    def test_output_errors_are_those_of_the_inputs_that_the_layer_saw(self, strong_llama, tmp_path):
        """The first block's q, k and v see the normalised embeddings, whatever has been quantized."""
        from transformers import AutoModelForCausalLM

        report = quantize(strong_llama, tmp_path / "out", format="dense", **MORE)
        from qinit.text.sources import load_samples

        config = json.loads((strong_llama / "config.json").read_text())
        tokens = load_samples("random", strong_llama, config, samples=32, length=32, seed=0).tokens
        source = AutoModelForCausalLM.from_pretrained(strong_llama, dtype=torch.float32)
        layer, modules = source.model.layers[0], lora_modules(load(tmp_path / "out"))
        with torch.no_grad():
            x = layer.input_layernorm(source.model.embed_tokens(tokens)).flatten(0, 1)
        for name in ("q_proj", "k_proj", "v_proj"):
            row = next(row for row in report.layers if row.name == f"model.layers.0.self_attn.{name}")
            wanted = x @ layer.self_attn.get_submodule(name).weight.detach().T
            module = modules[row.name]
            base, low_rank = dense_weight(module.base_layer), delta(module)
            assert relative(x @ base.T, wanted) == pytest.approx(row.output_error_start, rel=1e-3)
            assert relative(x @ (base + low_rank).T, wanted) == pytest.approx(row.output_error, rel=1e-3)


def test_the_low_rank_is_fitted_under_what_the_outputs_cost(strong_llama, tmp_path, monkeypatch):
    def adapter(out):
        *_, last = events_of(strong_llama, out, **MORE)
        return last, safetensors.torch.load_file(out / "eqft_init/adapter_model.safetensors")

    with_metric, weighed = adapter(tmp_path / "with")

    def nothing(*_):
        return {}
        yield

    monkeypatch.setattr("qinit.runner.job.output_metrics", nothing)
    without, plain = adapter(tmp_path / "without")
    assert all(not torch.equal(weighed[name], plain[name]) for name in plain)
    # Under H alone, where all outputs count alike, a low rank that is fitted to that is the closer one.
    errors = [sum(row.output_error for row in last.report.layers) for last in (with_metric, without)]
    assert errors[1] < errors[0]


class TestReport:
    def test_events_tell_of_the_text_the_passes_and_the_layers(self, strong_llama, tmp_path):
        *events, last = events_of(strong_llama, tmp_path / "out")
        assert isinstance(last, Finished)
        assert events[0] == Sampling("random")
        measured = [name for event in events if isinstance(event, Measuring) for name in event.layers]
        names = [row.name for row in last.report.layers]
        assert sorted(measured) == sorted(3 * names)  # forward and back for the outputs' metrics, then the walk
        done = [event for event in events if isinstance(event, Done)]
        assert [event.name for event in events if isinstance(event, Working)] == [event.name for event in done]
        assert len({event.name for event in done}) == len(done)
        assert sum(event.nbytes for event in done) == last.report.totals["bytes_before"]
        assert {event.row for event in done if event.row} == set(last.report.layers)

    def test_totals_and_rows_have_the_calibration(self, strong_llama, tmp_path):
        report = quantize(strong_llama, tmp_path / "out", **FEW)
        text = "4 samples of 16 random tokens, seed 0"
        assert report.totals["calibration"] == {"text": text, "tokens": 64}
        assert 0 < report.totals["output_error"] < report.totals["output_error_start"] < 1
        assert {(row.tokens, len(row.trace)) for row in report.layers} == {(64, CALIBRATED["eqft"].iterations)}
        card = (tmp_path / "out/README.md").read_text()
        assert f"| calibrated on | {text} |\n" in card
        assert f"| relative output error, base alone | {report.totals['output_error_start']:.4f} |\n" in card
        assert f"| relative output error, base + adapter | {report.totals['output_error']:.4f} |\n" in card
        assert "calibration_samples: 4\n" in card

    def test_without_calibration_nothing_is_said_of_it(self, strong_llama, tmp_path):
        report = quantize(strong_llama, tmp_path / "out")
        assert not {"calibration", "output_error", "output_error_start"} & report.totals.keys()
        assert {(row.tokens, row.output_error) for row in report.layers} == {(None, None)}
        assert "calibrated on" not in (tmp_path / "out/README.md").read_text()

    def test_kept_layers_and_others_outside_of_the_blocks_are_written_and_said(self, tmp_path):
        source = make_checkpoint(tmp_path / "m", intermediate_size=80)
        report = quantize(source, tmp_path / "out", target_modules=".*(q_proj|up_proj)", **FEW)
        rows = {row.name: row for row in report.layers}
        assert rows["model.layers.1.self_attn.q_proj"].tokens == 64
        kept = rows["model.layers.1.mlp.up_proj"]
        assert (kept.tokens, kept.error) == (None, None)
        assert "80 x 64 is not divisible by 32" in kept.kept
        load(tmp_path / "out")

    def test_a_layer_that_the_text_never_reaches_is_solved_without_data(self, strong_llama, tmp_path, monkeypatch):
        real = OpenBlock.visit

        def unreached(block):
            for event in real(block):
                is_it = getattr(event, "layer", None) and event.layer.target.name == "model.layers.0.mlp.up_proj"
                yield replace(event, measured=lambda: None) if is_it else event

        monkeypatch.setattr(OpenBlock, "visit", unreached)
        report = quantize(strong_llama, tmp_path / "out", **FEW)
        row = next(row for row in report.layers if row.name == "model.layers.0.mlp.up_proj")
        assert (row.tokens, row.output_error) == (None, None)
        assert (
            "model.layers.0.mlp.up_proj: never reached by the calibration text, so solved without data" in report.notes
        )
        module = lora_modules(load(tmp_path / "out"))[row.name]
        loaded = dense_weight(module.base_layer) + delta(module)
        assert relative(loaded, source_weights(strong_llama)[row.name]) == pytest.approx(row.error, rel=2e-3)
        plain = quantize(strong_llama, tmp_path / "plain", iter=5)  # the same as a run without calibration
        assert row.error == next(other for other in plain.layers if other.name == row.name).error

    def test_a_model_that_cannot_be_streamed_is_taken_whole_and_that_is_said(self, strong_llama, tmp_path, monkeypatch):
        def refuse(*_args, **_options):
            raise NotStreamable("the model has no blocks")

        streamed = quantize(strong_llama, tmp_path / "streamed", calibration_mode="parallel", **FEW)
        monkeypatch.setattr("qinit.runner.calibrated.Walk", refuse)
        *events, last = events_of(strong_llama, tmp_path / "out", calibration_mode="parallel")
        note = "calibration with the whole model in memory: the model has no blocks"
        assert Noted(note) in events
        assert note in last.report.notes
        for one, other in zip(streamed.layers, last.report.layers, strict=True):
            assert one.output_error == pytest.approx(other.output_error, rel=0.05)

    def test_a_walk_that_breaks_off_midway_says_what_to_do_and_leaves_nothing(
        self, strong_llama, tmp_path, monkeypatch
    ):
        real = Walk.__iter__

        def breaks(walk):
            for number, block in enumerate(real(walk)):
                if number == 1:
                    raise NotStreamable("odd block")
                yield block

        monkeypatch.setattr(Walk, "__iter__", breaks)
        with pytest.raises(CalibrationError, match="odd block; use --calibration none or --calibration-mode parallel"):
            quantize(strong_llama, tmp_path / "place/out", **FEW)
        assert list((tmp_path / "place").iterdir()) == []


class TestDeterminism:
    @pytest.mark.parametrize("format", ["gptq", "dense"])
    @pytest.mark.parametrize("mode", ["sequential", "parallel"])
    def test_two_runs_give_the_same_bytes(self, strong_llama, tmp_path, mode, format):
        quantize(strong_llama, tmp_path / "one", format=format, calibration_mode=mode, **FEW)
        torch.manual_seed(99)
        quantize(strong_llama, tmp_path / "two", format=format, calibration_mode=mode, **FEW)
        assert weights_of(tmp_path / "one") == weights_of(tmp_path / "two")

    def test_the_modes_the_rounding_the_order_and_the_seed_change_them(self, strong_llama, tmp_path):
        others = ({"calibration_mode": "parallel"}, {"rounding": "nearest"}, {"act_order": True}, {"seed": 1})
        found = []
        for number, other in enumerate(({}, *others)):
            quantize(strong_llama, tmp_path / str(number), **FEW, **other)
            found.append(weights_of(tmp_path / str(number))["model.safetensors"])
        assert len(set(found)) == len(found)


@pytest.mark.parametrize("method", METHODS)
def test_every_row_of_the_method_table_runs(strong_llama, tmp_path, method):
    row = METHODS[method]
    options = dict(FEW) if row.needs else {"iter": None}
    report = quantize(
        strong_llama, tmp_path / "out", method=method, format="dense" if row.grid == "nf" else "gptq", **options
    )
    assert report.totals["layers"] == 14
    assert ("calibration" in report.totals) == bool(row.needs)
    if method != "qlora":
        assert report.totals["error"] != report.totals["error_start"]
    if row.metric in ("activation", "diagonal"):
        assert report.totals["output_error"] < report.totals["output_error_start"]
    modules, weights = lora_modules(load(tmp_path / "out")), source_weights(strong_llama)
    for row in report.layers[:7]:
        loaded = dense_weight(modules[row.name].base_layer) + delta(modules[row.name])
        assert relative(loaded, weights[row.name]) == pytest.approx(row.error, rel=3e-3)


@pytest.fixture(scope="module")
def correlated(tmp_path_factory):
    """Inputs with a few strong directions, as real models have: there calibration knows where errors count."""
    directory = make_checkpoint(tmp_path_factory.mktemp("models") / "m", dtype="float32", initializer_range=0.1)
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    basis = torch.linalg.qr(gauss(64, 64))[0]
    tensors["model.embed_tokens.weight"] @= basis * torch.logspace(0, -2, 64) @ basis.T * 8
    safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def without_data(correlated, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "out"
    quantize(correlated, out, format="dense", iter=5)
    return divergence(correlated, out)


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_on_correlated_inputs_the_outputs_are_closer_than_without_data(correlated, without_data, tmp_path, mode):
    quantize(correlated, tmp_path / "out", format="dense", **{**MORE, "calibration_mode": mode})
    found = divergence(correlated, tmp_path / "out")
    assert found < 0.8 * without_data


@torch.no_grad()
def divergence(source, out):
    """Return KL(source || quantized with its adapter) in nats per token, on tokens that no run has seen."""
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(3, 256, (16, 48), generator=torch.Generator().manual_seed(4321))
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    wanted, found = (
        torch.log_softmax(model(input_ids=tokens).logits, -1).flatten(0, 1) for model in (original, load(out).eval())
    )
    return float(torch.nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True))
