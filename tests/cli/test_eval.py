import json
import shutil
import sys

import pytest
import torch

from qinit.evaluate import loaded
from qinit.evaluate.figures import perplexity
from qinit.files.manifest import file_sum, read_manifest, write_manifest
from qinit.source.demo import demo_directory
from tests.evaluated import TEXT, TOKENS, make_run, make_source
from tests.helpers import contents, quantize
from tests.models import add_tokenizer, make_checkpoint, words
from tests.qinit.evaluate.test_tasks import harness  # noqa: F401 - a fixture
from tests.qinit.text.test_hub_documents import StandIn
from tests.stock import load, load_base


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source") / "llama")


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    return make_run(source, tmp_path_factory.mktemp("made") / "run", format="dense")


@pytest.fixture
def run(made, tmp_path):
    """A run to write into, with its list of sums."""
    directory = shutil.copytree(made, tmp_path / "run")
    write_manifest(directory)
    return directory


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def table(out):
    """The lines of the table by their first column."""
    lines = (line.strip().split("  ", 1) for line in out.splitlines() if line.startswith(" "))
    return {parts[0]: parts[-1].strip() for parts in lines}


class TestARun:
    def test_where_memory_is_used_up_it_is_said_what_to_do(self, command, run, text, monkeypatch):
        def full(*_):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr("qinit.evaluate.job.measure", full)
        code, _, err = command("eval", run, "--text", text, "--length", 25, "--batch-size", 3)
        assert (code, err) == (
            2,
            f"error: {run}: the memory of cpu is used up by a batch of 3; use a smaller --batch-size or --length, or "
            "--device cpu\n",
        )

    def test_its_perplexity_is_what_the_stock_loaders_have_and_it_is_said_how_it_was_measured(self, command, run, text):
        code, out, err = command("eval", run, "--text", text, "--length", 25)
        assert (code, err) == (0, "")
        expected = perplexity(load(run), TOKENS, 25)
        found = table(out)
        assert found["perplexity"].startswith(f"{expected:.3f} (")
        assert found["measured on"] == (
            "8 windows of 25 tokens that do not overlap, the first token of each given; 192 tokens predicted; "
            "one text; no special tokens; float32"
        )
        assert out.startswith("note: with the whole model in memory (")
        assert out.splitlines()[-1] == f"written to {run / 'qinit.json'} and {run / 'README.md'}"
        assert "KL(original || it)" not in found

    def test_it_is_written_into_report_card_and_list(self, command, run, text):
        command("eval", run, "--text", text, "--length", 25, "--stride", 10)
        row = json.loads((run / "qinit.json").read_text())["totals"]["evaluations"][0]
        assert (row["text"], row["length"], row["stride"], row["tokens"]) == ("text.txt", 25, 10, 202)
        assert f"| text.txt | {row['perplexity']:.3f} | - | - | - |" in (run / "README.md").read_text()
        sums = read_manifest(run)
        assert all(sums[name] == file_sum(run / name) for name in sums)

    def test_the_original_gives_kl_and_agreement_and_the_report_shows_the_distance(self, command, run, source, text):
        code, out, _ = command("eval", run, "--text", text, "--length", 25, "--reference", source, "--batch-size", 3)
        assert code == 0
        row = json.loads((run / "qinit.json").read_text())["totals"]["evaluations"][0]
        assert row["reference"] == "llama"  # and not where it lies
        assert row["reference_perplexity"] == pytest.approx(perplexity(load_base(source), TOKENS, 25), rel=1e-5)
        found = table(out)
        excess = row["loss"] - torch.tensor(row["reference_perplexity"], dtype=torch.float64).log().item()
        assert found["original"] == f"{row['reference_perplexity']:.3f} of llama: {excess:+.4f} nats"
        assert found["KL(original || it)"] == f"{row['kl']:.4f} nats per token"
        assert found["same top token"] == f"{100 * row['top1_agreement']:.1f} %"
        code, out, _ = command("report", run)
        assert table(out)["perplexity on text.txt, windows of 25"].startswith(
            f"{row['perplexity']:.3f}, {excess:+.4f} nats"
        )

    def test_streamed_it_is_the_same_and_says_each_block(self, command, run, source, text):
        arguments = ("eval", run, "--text", text, "--length", 25, "--reference", source, "--json", "--no-save")
        _, whole, _ = command(*arguments, "--stream", "never")
        code, streamed, err = command(*arguments, "--stream", "always")
        assert code == 0
        one, other = json.loads(whole), json.loads(streamed)
        for key in ("loss", "reference_perplexity", "kl", "top1_agreement"):
            assert other[key] == pytest.approx(one[key], rel=1e-4)
        assert (one["streamed"], other["streamed"]) == (False, True)
        assert f"{run}: block 2 of 2" in err
        assert "note: block by block, one in memory at a time (as asked)" in err

    def test_no_save_leaves_it_as_it_was(self, command, run, text):
        before = contents(run)
        code, out, _ = command("eval", run, "--text", text, "--length", 25, "--no-save")
        assert code == 0
        assert "written to" not in out
        assert contents(run) == before

    def test_json_is_all_of_stdout_and_quiet_is_nothing(self, command, run, text):
        code, out, err = command("eval", run, "--text", text, "--length", 25, "--windows", 2, "--json", "--quiet")
        assert (code, err) == (0, "")
        value = json.loads(out)
        assert (value["windows"], value["tokens"], value["tasks"]) == (2, 48, {})
        assert value["written"] == ["qinit.json", "README.md"]
        assert command("eval", run, "--text", text, "--length", 25, "--quiet") == (0, "", "")


class TestOthers:
    def test_a_checkpoint_gets_nothing_written(self, command, source, text):
        before = contents(source)
        code, out, err = command("eval", source, "--text", text)
        assert (code, err) == (0, "")
        assert table(out)["perplexity"].startswith(f"{perplexity(load_base(source), TOKENS, 128):.3f} (")
        assert contents(source) == before

    def test_a_base_without_its_adapter(self, command, run, text):
        before = contents(run)
        code, out, _ = command("eval", "--base", run, "--text", text, "--length", 25)
        assert code == 0
        assert table(out)["perplexity"].startswith(f"{perplexity(load_base(run), TOKENS, 25):.3f} (")
        assert contents(run) == before

    def test_another_adapter_is_said_to_leave_the_report_alone(self, command, run, made, text):
        code, out, _ = command(
            "eval", "--base", run, "--adapter", shutil.copytree(made / "eqft_init", run.parent / "trained"),
            "--text", text, "--length", 25,
        )  # fmt: skip
        assert code == 0
        assert "note: the adapter is not the one that the run started with, so nothing is written into a report" in out
        assert "evaluations" not in (run / "qinit.json").read_text()

    def test_a_data_set(self, command, source, monkeypatch):
        stand_in = StandIn()
        stand_in.rows = [{"page": words(*TOKENS[:20].tolist())}, {"page": ""}, {"page": words(*TOKENS[20:30].tolist())}]
        monkeypatch.setattr("datasets.load_dataset", stand_in)
        code, out, err = command(
            "eval", source, "--dataset", "owner/words:raw@validation", "--text-field", "page", "--length", 10
        )
        assert (code, err) == (0, "")
        assert table(out)["text"] == "owner/words:raw@validation"
        assert "3 windows of 10 tokens" in table(out)["measured on"]
        assert "3 documents joined with blank lines" in table(out)["measured on"]

    def test_the_demo_model_has_its_own_text(self, command):
        code, out, err = command("eval", demo_directory(), "--windows", 1, "--stream", "never")
        assert (code, err) == (0, "")
        assert table(out)["text"] == "held-out text of the demo model"
        assert "1 window of 512 tokens" in table(out)["measured on"]


class TestMoved:
    @pytest.fixture
    def moved(self, run):
        file = run / "eqft_init/adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "/gone/run"}))
        write_manifest(run)
        return run

    def test_it_is_found_said_and_put_right_if_asked_to(self, command, moved, text):
        arguments = ("eval", "--adapter", moved / "eqft_init", "--text", text, "--length", 25)
        code, out, err = command(*arguments)
        assert (code, err) == (0, "")
        assert "adapter_config.json names the base '/gone/run', which is not there; taking the run that the" in out
        assert "note: --repair writes that into adapter_config.json" in out
        assert "/gone/run" in (moved / "eqft_init/adapter_config.json").read_text()
        code, out, _ = command(*arguments, "--repair")
        assert code == 0
        assert "note: wrote that into adapter_config.json" in out
        named = json.loads((moved / "eqft_init/adapter_config.json").read_text())["base_model_name_or_path"]
        assert named == str(moved.resolve())
        sums = read_manifest(moved)
        assert all(sums[name] == file_sum(moved / name) for name in sums)
        assert "note: " not in command(*arguments, "--stream", "never")[1].replace("note: with the whole model", "")


class TestTasks:
    def test_they_are_handed_over_with_the_model_and_written_down(self, command, run, harness):  # noqa: F811
        code, out, err = command("eval", run, "--tasks", "arc_easy", "--batch-size", 4)
        assert (code, err) == (0, "")
        handed, tasks = harness.asked
        assert tasks == ["arc_easy"]
        assert (handed.batch_size, handed.tokenizer.convert_ids_to_tokens(7)) == (4, "w7")
        assert type(handed.pretrained).__name__ == "PeftModelForCausalLM"
        assert table(out)["arc_easy"] == "acc,none 0.5000, acc_stderr,none 0.0100, acc_norm,none 1.0000"
        totals = json.loads((run / "qinit.json").read_text())["totals"]
        assert totals["tasks"] == {"arc_easy": {"acc,none": 0.5, "acc_stderr,none": 0.01, "acc_norm,none": 1.0}}
        assert "evaluations" not in totals

    def test_beside_a_text_both_are_measured(self, command, run, text, harness):  # noqa: F811
        code, out, _ = command("eval", run, "--tasks", "arc_easy", "--text", text, "--length", 25, "--json")
        assert code == 0
        value = json.loads(out)
        assert value["tasks"]["arc_easy"]["acc,none"] == 0.5
        assert value["tokens"] == 192


class TestBadInput:
    def refused(self, command, *arguments):
        """One line on stderr and 2; returns the line."""
        code, out, err = command("eval", *arguments)
        assert code == 2
        assert err.count("\n") == 1
        assert "Traceback" not in err + out
        return err

    def test_no_text(self, command, run):
        before = contents(run)
        assert "no text to measure on; give --text FILE or --dataset" in self.refused(command, run)
        assert contents(run) == before

    def test_a_text_shorter_than_a_window(self, command, run, text):
        text.write_text(words(4, 5, 6))
        err = self.refused(command, run, "--text", text, "--length", 5)
        assert "error: text.txt: the text has 3 tokens, fewer than one window of 5; " in err

    def test_a_length_beyond_the_model_s(self, command, run, text):
        assert "length: 129 is more than the 128 positions" in self.refused(
            command, run, "--text", text, "--length", 129
        )

    def test_a_tokenizer_of_another_model(self, command, text, tmp_path):
        other = add_tokenizer(make_checkpoint(tmp_path / "m"), size=300)
        text.write_text(words(*range(4, 300)))
        assert "token id 299, but the model has ids up to 255" in self.refused(command, other, "--text", text)

    def test_a_tokenizer_that_is_not_the_reference_s(self, command, run, source, text, tmp_path):
        other = shutil.copytree(source, tmp_path / "other")
        file = other / "tokenizer.json"
        content = json.loads(file.read_text())
        content["model"]["vocab"] |= {f"w{i}": 259 - i for i in range(4, 256)}
        file.write_text(json.dumps(content))
        err = self.refused(command, run, "--text", text, "--length", 25, "--reference", other)
        assert "makes other tokens of it than the reference's" in err

    def test_a_reference_with_another_vocabulary(self, command, run, text, tmp_path):
        other = make_checkpoint(tmp_path / "other", vocab_size=320)
        err = self.refused(command, run, "--text", text, "--length", 25, "--reference", other)
        assert "vocab_size 256, the reference's" in err

    def test_a_run_without_its_adapter(self, command, run, text):
        shutil.rmtree(run / "eqft_init")
        assert "--base" in self.refused(command, run, "--text", text)

    def test_an_adapter_whose_base_is_gone(self, command, run, text, tmp_path):
        adapter = shutil.copytree(run / "eqft_init", tmp_path / "adapter")
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "/gone/run"}))
        err = self.refused(command, adapter, "--text", text)
        assert "names the base '/gone/run', which is not there; if it has moved, say where it is now with --base" in err

    def test_a_damaged_report_is_found_before_the_work(self, command, run, text, monkeypatch):
        (run / "qinit.json").write_text("{}")
        monkeypatch.setattr(loaded, "load_parts", lambda *_, **__: pytest.fail("loaded"))
        assert "not a report of qinit" in self.refused(command, run, "--text", text, "--length", 25)

    def test_nothing_is_written_when_the_run_fails_on_the_way(self, command, made, text, tmp_path):
        from safetensors.torch import load_file, save_file

        run = shutil.copytree(made, tmp_path / "run")
        tensors = load_file(run / "model.safetensors")
        tensors["model.layers.0.mlp.up_proj.weight"][0] = float("nan")
        save_file(tensors, run / "model.safetensors", metadata={"format": "pt"})
        before = contents(run)
        assert "NaN or Inf" in self.refused(command, run, "--text", text, "--length", 25)
        assert contents(run) == before

    def test_options_that_exclude_each_other(self, command, run, text):
        assert "one of the two" in self.refused(command, run, "--text", text, "--dataset", "a/b")
        assert "one of the two" in self.refused(command, run, "--base", run)
        assert "one of the two" in self.refused(command)
        assert "dtype" in self.refused(command, run, "--text", text, "--stream", "always", "--dtype", "float16")

    def test_tasks_without_the_harness(self, command, run, monkeypatch):
        monkeypatch.setitem(sys.modules, "lm_eval", None)
        assert 'pip install "qinit[eval]"' in self.refused(command, run, "--tasks", "arc_easy")

    def test_a_reference_without_a_text_to_compare_on(self, command, run, source, harness):  # noqa: F811
        err = self.refused(command, run, "--tasks", "arc_easy", "--reference", source)
        assert "give --text FILE or --dataset" in err


def test_a_run_with_mixed_widths_shows_the_measured_point_on_its_front(command, source, text, tmp_path):
    quantize(source, tmp_path / "run", bits=None, ratio=0.5, format="dense", group_size=32)
    command("eval", tmp_path / "run", "--text", text, "--length", 25, "--reference", source)
    from qinit.report.pictures.contents import pareto_front
    from qinit.report.report import Report

    report = Report.read(tmp_path / "run")
    front = pareto_front(report)
    row = report.totals["evaluations"][0]
    excess = row["loss"] - torch.tensor(row["reference_perplexity"], dtype=torch.float64).log().item()
    assert front.measured == [(front.chosen[0][0], pytest.approx(excess))]
