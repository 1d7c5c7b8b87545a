import json

import pytest
import torch

from qinit.errors import CheckpointError, QinitError, RecipeError
from qinit.evaluate import job, loaded
from qinit.evaluate.job import Evaluated, Loading, Read, check_vocabularies, choose_way, evaluate
from qinit.evaluate.loaded import loaded_bytes
from qinit.evaluate.subject import Subject
from qinit.evaluate.windows import cut_windows
from tests.evaluated import CPU, TOKENS, figures, make_run, make_source, subject
from tests.models import make_bert, make_checkpoint

WINDOWS = cut_windows(TOKENS, 25)


class TestWay:
    def test_what_fits_is_taken_whole_and_what_does_not_is_streamed(self, source, monkeypatch):
        model = Subject("m", source)
        way = choose_way(model, None, WINDOWS, CPU)
        assert (way.streamed, way.dtype) == (False, "float32")
        assert "GB needed in float32" in way.reason
        monkeypatch.setattr(job, "free_memory", lambda device: 0)
        assert choose_way(model, None, WINDOWS, CPU).streamed
        assert not choose_way(model, None, WINDOWS, CPU, stream="never").streamed

    def test_between_both_the_limit_is_what_the_headers_say(self, source, monkeypatch):
        model = Subject("m", source)
        logits = loaded.logits_bytes(WINDOWS, 256, 8)
        needed = loaded_bytes(model, torch.float32) + logits
        for free, streamed in ((needed / loaded.SHARE + 1, False), (needed / loaded.SHARE - 1, True)):
            monkeypatch.setattr(job, "free_memory", lambda device, free=free: free)
            assert choose_way(model, None, WINDOWS, CPU).streamed == streamed
            assert choose_way(model, model, WINDOWS, CPU).streamed  # two do not fit

    def test_a_streamed_one_computes_in_float32(self, source, monkeypatch):
        monkeypatch.setattr(job, "free_memory", lambda device: 0)
        assert choose_way(Subject("m", source), None, WINDOWS, CPU, dtype="bfloat16").dtype == "float32"
        with pytest.raises(RecipeError, match="a streamed evaluation computes in float32, not bfloat16"):
            choose_way(Subject("m", source), None, WINDOWS, CPU, dtype="bfloat16", stream="always")

    def test_packed_weights_without_their_packages_are_streamed(self, packed, monkeypatch):
        monkeypatch.setattr("qinit.formats.reader.find_spec", lambda name: None if name == "optimum" else object())
        way = choose_way(subject(packed), None, WINDOWS, CPU)
        assert way.streamed
        assert way.reason == "optimum not being installed to load packed weights"

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"stream": "sometimes"}, "stream: expected auto, always, never, found 'sometimes'"),
            ({"dtype": "int8"}, "dtype: expected float32, bfloat16, float16, found 'int8'"),
            ({"batch_size": 0}, "batch_size: expected 1 or more, found 0"),
            ({"stream": "always", "tasks": True}, "needs the whole model in memory"),
        ],
    )
    def test_options_out_of_range(self, source, options, said):
        with pytest.raises(RecipeError, match=said):
            choose_way(Subject("m", source), None, WINDOWS, CPU, **options)


def test_the_events_are_loading_reading_and_the_figures(source):
    way = choose_way(Subject("m", source), None, WINDOWS, CPU, batch_size=3)
    *events, last = evaluate(Subject("m", source), None, WINDOWS, way, CPU)
    assert events == [Loading("m"), Read(3, 8), Read(6, 8), Read(8, 8)]
    assert isinstance(last, Evaluated)
    assert last.seconds > 0
    assert last.figures.tokens == 8 * 24


def test_the_dtype_is_what_is_computed_in(source):
    exact, rough = (figures(Subject("m", source), dtype=dtype).loss for dtype in ("float32", "bfloat16"))
    assert exact != rough
    assert rough == pytest.approx(exact, rel=0.02)


class TestBadInput:
    def test_another_vocabulary(self, source, tmp_path):
        other = make_checkpoint(tmp_path / "other", vocab_size=320)
        with pytest.raises(QinitError, match=r"has vocab_size 256, the reference's .*other/config.json 320"):
            check_vocabularies(Subject("m", source), Subject("other", other))
        check_vocabularies(Subject("m", source), Subject("same", source))

    def test_a_model_that_predicts_no_next_token(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"needs a causal language model .* found BertForMaskedLM"):
            assert Subject("m", make_bert(tmp_path / "bert")).facts

    def test_an_adapter_of_a_model_with_other_layers(self, source, tmp_path):
        deeper = make_run(make_checkpoint(tmp_path / "source", num_hidden_layers=1), tmp_path / "run", format="dense")
        with pytest.raises(CheckpointError, match="the adapter cannot be loaded"):
            figures(Subject("m", source, deeper / "eqft_init"), stream="never")

    @pytest.mark.parametrize("stream", ["always", "never"])
    def test_weights_that_are_no_numbers(self, stream, tmp_path):
        from safetensors.torch import load_file, save_file

        source = make_source(tmp_path / "m")
        tensors = load_file(source / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3] = float("nan")
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(QinitError, match="NaN or Inf"):
            figures(Subject("m", source), stream=stream)

    def test_packed_weights_of_another_width_than_the_configuration_says(self, packed, tmp_path):
        import shutil

        copy = shutil.copytree(packed, tmp_path / "copy")
        config = json.loads((copy / "config.json").read_text())
        config["quantization_config"]["bits"] = 4
        (copy / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"config.json says 4 bits, so .* belong to different models"):
            figures(subject(copy), stream="always")
