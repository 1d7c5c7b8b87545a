from functools import partial

import pytest
import safetensors.torch

from qinit.events import Noted, Progress
from qinit.files.writer import SafetensorsWriter
from qinit.train.polish import polish
from qinit.workplace.place import partial_of
from tests.broken_off import RUNS, Crash, finish, result_in, undisturbed
from tests.helpers import quantize, weights_of
from tests.models import make_checkpoint
from tests.qinit.runner.test_calibrated import FEW, POLISHED, events_of, source_weights
from tests.stock import delta, dense_weight, load, lora_modules, relative


def test_a_polish_that_was_made_is_not_made_again(strong_llama, place, monkeypatch):
    options = RUNS["polish"]
    wanted = undisturbed(strong_llama, place, **options)
    assert wanted["qinit.json"]["totals"]["calibration"]["polish"]["kept"]

    def crash(*_):
        raise Crash

    with monkeypatch.context() as context:
        context.setattr("qinit.runner.run.complete", crash)
        with pytest.raises(Crash):
            finish(strong_llama, place / "out", **options)
    monkeypatch.setattr("qinit.runner.polished.polish", crash)
    finish(strong_llama, place / "out", **options)
    assert result_in(place / "out") == wanted


def test_a_crash_while_polished_factors_are_written_spoils_nothing(strong_llama, place, monkeypatch):
    options = RUNS["polish"]
    wanted = undisturbed(strong_llama, place, **options)
    real = SafetensorsWriter.write

    def write(self, name, tensor):
        polished = (partial_of(place / "out") / "polished.safetensors").exists()
        if polished and self._stem == "adapter_model" and "layers.1.mlp.up" in name:
            raise Crash
        return real(self, name, tensor)

    with monkeypatch.context() as context:
        context.setattr(SafetensorsWriter, "write", write)
        with pytest.raises(Crash):
            finish(strong_llama, place / "out", **options)
    finish(strong_llama, place / "out", **options)
    assert result_in(place / "out") == wanted


@pytest.mark.parametrize("format", ["gptq", "dense"])
def test_a_polished_adapter_is_the_one_that_is_loaded(strong_llama, tmp_path, format):
    report = quantize(strong_llama, tmp_path / "out", format=format, use_rslora=True, lora_alpha=7.0, **POLISHED)
    assert report.totals["calibration"]["polish"]["kept"]
    modules, weights = lora_modules(load(tmp_path / "out")), source_weights(strong_llama)
    for row in report.layers:
        loaded = dense_weight(modules[row.name].base_layer) + delta(modules[row.name])
        assert relative(loaded, weights[row.name]) == pytest.approx(row.error, rel=2e-3)


def test_a_polished_run_too(strong_llama, tmp_path):
    for name in ("one", "two"):
        quantize(strong_llama, tmp_path / name, **POLISHED)
    assert weights_of(tmp_path / "one") == weights_of(tmp_path / "two")


class TestPolish:
    def test_it_is_kept_where_it_lowers_the_held_out_loss(self, strong_llama, tmp_path):
        plain = quantize(strong_llama, tmp_path / "plain", **{**POLISHED, "polish": 0})
        *events, last = events_of(strong_llama, tmp_path / "out", **POLISHED)
        steps = [event for event in events if isinstance(event, Progress)]
        found = last.report.totals["calibration"]["polish"]
        assert [event.step for event in steps] == [0, 1, 2, 3, 4, 5]
        assert found == {
            **{"steps": 5, "held_out_before": steps[0].held_out, "held_out_after": steps[-1].held_out, "kept": True},
        }
        assert found["held_out_after"] < found["held_out_before"]
        one, other = weights_of(tmp_path / "plain"), weights_of(tmp_path / "out")
        assert one["model.safetensors"] == other["model.safetensors"]
        assert one["eqft_init/adapter_model.safetensors"] != other["eqft_init/adapter_model.safetensors"]
        assert [row.error_start for row in plain.layers] == [row.error_start for row in last.report.layers]
        assert all(a.error != b.error for a, b in zip(plain.layers, last.report.layers, strict=True))
        # What the layers' outputs are off by was not measured again.
        assert {row.output_error for row in last.report.layers} == {None}
        assert "output_error" not in last.report.totals

    def test_it_is_refused_where_it_does_not(self, strong_llama, tmp_path, monkeypatch):
        plain = quantize(strong_llama, tmp_path / "plain", **FEW)
        monkeypatch.setattr("qinit.runner.polished.polish", partial(polish, learning_rate=0.0))
        *events, last = events_of(strong_llama, tmp_path / "out", polish=3)
        note = "polish: did not lower the held-out loss, so the adapters stay as they were"
        assert Noted(note) in events
        assert note in last.report.notes
        assert not last.report.totals["calibration"]["polish"]["kept"]
        assert weights_of(tmp_path / "plain") == weights_of(tmp_path / "out")
        errors = [[(row.error, row.output_error) for row in report.layers] for report in (plain, last.report)]
        assert errors[0] == errors[1]
        assert "| polish | 3 steps, nothing gained |\n" in (tmp_path / "out/README.md").read_text()

    def test_a_kept_layer_keeps_its_fresh_adapter(self, tmp_path):
        source = make_checkpoint(tmp_path / "m", intermediate_size=80, initializer_range=0.1)
        quantize(source, tmp_path / "out", **POLISHED)
        factors = safetensors.torch.load_file(tmp_path / "out/eqft_init/adapter_model.safetensors")
        name = "base_model.model.model.layers.0.mlp.up_proj"
        assert factors[f"{name}.lora_A.weight"].any()
        assert not factors[f"{name}.lora_B.weight"].any()
        assert len(factors) == 28
