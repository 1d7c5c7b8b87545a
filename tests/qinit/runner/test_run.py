import errno
import json
import shutil
import signal

import pytest
import safetensors.torch
import torch

from qinit.errors import CheckpointError, OutputError
from qinit.events import Done, Finished, Working
from qinit.files.tensors import TensorSpec
from qinit.files.writer import SafetensorsWriter
from qinit.workplace.place import kept
from tests.broken_off import PLAIN, fail_at_layer, start
from tests.helpers import edit_tensors, everything, names, quantize, weights_of
from tests.models import make_checkpoint


class TestWhatIsWritten:
    def test_events_cover_every_tensor_and_end_with_the_report(self, tiny_llama, place):
        *events, last = start(tiny_llama, place / "out", **PLAIN)
        assert isinstance(last, Finished)
        assert events[0::2] == [Working(event.name, event.nbytes) for event in events[1::2]]
        done = [event for event in events if isinstance(event, Done)]
        assert sum(event.nbytes for event in done) == last.report.totals["bytes_before"]
        by_name = {event.row.name: event.row for event in done if event.row}
        assert by_name == {row.name: row for row in last.report.layers}
        assert len(last.report.layers) == 14

    def test_untouched_tensors_are_copied_bit_by_bit(self, tiny_llama, place):
        quantize(tiny_llama, place / "out")
        before = safetensors.torch.load_file(tiny_llama / "model.safetensors")
        after = safetensors.torch.load_file(place / "out/model.safetensors")
        copied = before.keys() & after.keys()
        assert copied == {name for name in before if "proj" not in name}
        assert all(torch.equal(before[name], after[name]) for name in copied)

    def test_tied_weights_stay_tied(self, tmp_path, place):
        quantize(make_checkpoint(tmp_path / "m", tie_word_embeddings=True), place / "out", format="dense")
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(place / "out")
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_companions_travel_and_weights_do_not(self, tiny_llama, place):
        (tiny_llama / "tokenizer.json").write_text("{}")
        (tiny_llama / "templates").mkdir()
        (tiny_llama / "templates/tool.jinja").write_text("hi")
        (tiny_llama / "pytorch_model.bin").write_bytes(b"x")
        quantize(tiny_llama, place / "out")
        assert everything(place / "out") == [
            *("README.md", "SHA256SUMS", "config.json", "eqft_init", "eqft_init/adapter_config.json"),
            *("eqft_init/adapter_model.safetensors", "generation_config.json", "model.safetensors", "qinit.json"),
            *("templates", "templates/tool.jinja", "tokenizer.json"),
        ]

    def test_the_output_of_a_dense_run_can_be_the_source_of_another(self, tiny_llama, place):
        quantize(tiny_llama, place / "one", format="dense", bits=8)
        report = quantize(place / "one", place / "two")
        assert report.totals["layers"] == 14

    def test_shards_and_index_are_what_transformers_loads(self, tiny_llama, place):
        quantize(tiny_llama, place / "one", format="dense")
        quantize(tiny_llama, place / "many", format="dense", max_shard_size="40KB")
        assert len(list((place / "many").glob("model-*-of-*.safetensors"))) > 3
        from transformers import AutoModelForCausalLM

        one, many = (AutoModelForCausalLM.from_pretrained(place / name).state_dict() for name in ("one", "many"))
        assert one.keys() == many.keys()
        assert all(torch.equal(one[name], many[name]) for name in one)

    def test_a_layer_of_zeros_works(self, tiny_llama, place):
        edit_tensors(
            tiny_llama / "model.safetensors", lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].zero_()
        )
        report = quantize(tiny_llama, place / "out", format="dense")
        row = next(row for row in report.layers if row.name == "model.layers.0.mlp.up_proj")
        assert row.error == row.error_start == 0
        written = safetensors.torch.load_file(place / "out/model.safetensors")
        assert not written["model.layers.0.mlp.up_proj.weight"].any()

    def test_kept_layers_are_copied_and_get_a_fresh_adapter(self, tmp_path, place):
        source = make_checkpoint(tmp_path / "m", intermediate_size=80)
        report = quantize(source, place / "out")
        assert report.totals["layers_kept"] == 6
        name = "model.layers.0.mlp.up_proj"
        before = safetensors.torch.load_file(source / "model.safetensors")
        after = safetensors.torch.load_file(place / "out/model.safetensors")
        factors = safetensors.torch.load_file(place / "out/eqft_init/adapter_model.safetensors")
        assert torch.equal(before[name + ".weight"], after[name + ".weight"])
        assert factors[f"base_model.model.{name}.lora_A.weight"].any()
        assert not factors[f"base_model.model.{name}.lora_B.weight"].any()

    def test_a_rank_above_a_matrix_is_written_as_a_rank_pattern(self, tiny_llama, place):
        quantize(tiny_llama, place / "out", rank=48)
        config = json.loads((place / "out/eqft_init/adapter_config.json").read_text())
        assert config["r"] == 48
        assert config["rank_pattern"]["model.layers.0.self_attn.k_proj"] == 32

    def test_a_recipe_from_qinit_json_reproduces_the_run(self, tiny_llama, place):
        quantize(tiny_llama, place / "one", bits=3, lora_alpha=32, use_rslora=True, exclude="o_proj", seed=5)
        recipe = json.loads((place / "one/qinit.json").read_text())["recipe"]
        quantize(tiny_llama, place / "two", **recipe)
        assert weights_of(place / "one") == weights_of(place / "two")

    def test_no_path_of_the_temporary_directory_is_left_in_any_file(self, tiny_llama, place):
        quantize(tiny_llama, place / "out")
        texts = [file.read_text() for file in (place / "out").rglob("*") if file.suffix in (".json", ".md")]
        assert len(texts) == 5
        assert not any("partial" in text for text in texts)


class TestDeterminism:
    @pytest.mark.parametrize("format", ["gptq", "dense"])
    def test_the_same_input_gives_the_same_bytes(self, tiny_llama, place, format):
        quantize(tiny_llama, place / "one", format=format, iter=3)
        quantize(tiny_llama, place / "two", format=format, iter=3)
        assert weights_of(place / "one") == weights_of(place / "two")
        assert len(weights_of(place / "one")) == 2

    def test_the_order_of_the_tensors_changes_no_layers_bytes(self, tmp_path, place):
        source = make_checkpoint(tmp_path / "m")
        tensors = dict(reversed(safetensors.torch.load_file(source / "model.safetensors").items()))
        other = tmp_path / "reversed"
        shutil.copytree(source, other, ignore=shutil.ignore_patterns("*.safetensors"))
        writer = SafetensorsWriter(other, [TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()])
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.close()
        orders = [
            [event.name for event in start(s, place / s.name, **PLAIN) if isinstance(event, Done)]
            for s in (source, other)
        ]
        assert orders[0] == orders[1][::-1]
        for file in ("model.safetensors", "eqft_init/adapter_model.safetensors"):
            one, two = (safetensors.torch.load_file(place / run / file) for run in ("m", "reversed"))
            assert one.keys() == two.keys()
            assert all(torch.equal(one[name], two[name]) for name in one)

    def test_a_layer_does_not_depend_on_which_others_are_quantized(self, tiny_llama, place):
        quantize(tiny_llama, place / "all", format="dense")
        quantize(tiny_llama, place / "some", format="dense", target_modules="up_proj")
        name = "model.layers.1.mlp.up_proj.weight"
        one, other = (safetensors.torch.load_file(place / run / "model.safetensors") for run in ("all", "some"))
        assert torch.equal(one[name], other[name])

    def test_the_seed_reaches_the_layers(self, tiny_llama, place):
        quantize(tiny_llama, place / "one", seed=0)
        quantize(tiny_llama, place / "two", seed=1)
        assert weights_of(place / "one") != weights_of(place / "two")


class TestFailure:
    @pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), MemoryError()])
    def test_a_run_that_fails_at_its_first_layer_leaves_nothing(self, tiny_llama, place, monkeypatch, error):
        fail_at_layer(monkeypatch, 1, error)
        with pytest.raises(type(error)):
            quantize(tiny_llama, place / "out")
        assert everything(place) == []

    @pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), MemoryError()])
    def test_a_failed_run_leaves_its_finished_layers_only(self, tiny_llama, place, monkeypatch, error):
        fail_at_layer(monkeypatch, 3, error)
        with pytest.raises(type(error)) as caught:
            quantize(tiny_llama, place / "out")
        assert names(place) == [".out.partial"]
        assert names(place / ".out.partial") == ["journal", "run"]
        assert kept(place / "out") == "2 of 14 layers are kept, the same command goes on from there"
        if isinstance(error, Exception):
            assert caught.value.__notes__ == [kept(place / "out")]

    @pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
    def test_a_failed_run_leaves_the_old_output_intact(self, tiny_llama, place, monkeypatch, error):
        quantize(tiny_llama, place / "out")
        before = {path: path.read_bytes() for path in (place / "out").rglob("*") if path.is_file()}
        fail_at_layer(monkeypatch, 3, error)
        with pytest.raises(type(error)):
            quantize(tiny_llama, place / "out", overwrite=True, bits=3)
        assert {path: path.read_bytes() for path in (place / "out").rglob("*") if path.is_file()} == before

    @pytest.mark.parametrize(("steps", "left"), [(1, []), (2, []), (9, [".out.partial"]), (42, [".out.partial"])])
    def test_a_run_that_is_given_up_leaves_its_finished_layers_only(self, tiny_llama, place, steps, left):
        events = start(tiny_llama, place / "out", **PLAIN)
        for _ in range(steps):
            next(events)
        events.close()
        assert names(place) == left

    def test_a_killed_process_leaves_nothing_at_the_final_name(self, forks, tiny_llama, place, tmp_path):
        kill = {"rank": 0, "layers": 3, "journal": str(place / ".out.partial/journal")}
        options = ("--rank", 4, "--iter", 1, "--calibration", "none", "--no-check")
        line = ("eqft", tiny_llama, *options, "--out", place / "out")
        assert forks.together(tmp_path / "log", 1, *line, kill=kill) == [-signal.SIGKILL]
        assert names(place) == [".out.partial"]
        quantize(tiny_llama, place / "out")
        assert names(place) == ["out"]

    def test_a_disk_that_fills_up_midway_is_one_clean_error(self, tiny_llama, place, monkeypatch):
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(SafetensorsWriter, "write_chunks", full)
        with pytest.raises(OutputError, match=r"No space left on device.*nothing was left"):
            quantize(tiny_llama, place / "out")
        assert everything(place) == []

    @pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
    def test_bad_values_name_the_tensor_and_their_number(self, tiny_llama, place, name):
        edit_tensors(tiny_llama / "model.safetensors", lambda tensors: tensors[name].view(-1)[:3].fill_(float("nan")))
        with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor '{name}' holds 3 NaN or Inf among"):
            quantize(tiny_llama, place / "out")
        assert everything(place) == []

    def test_bad_values_are_counted_over_the_chunks_of_a_large_tensor(self, tiny_llama, place, monkeypatch):
        monkeypatch.setattr("qinit.files.tensors.StoredTensor.chunks.__defaults__", (64,))
        edit_tensors(
            tiny_llama / "model.safetensors", lambda tensors: tensors["lm_head.weight"][::2, 0].fill_(float("inf"))
        )
        with pytest.raises(CheckpointError, match=r"'lm_head\.weight' holds 128 NaN or Inf among 16384"):
            quantize(tiny_llama, place / "out")
