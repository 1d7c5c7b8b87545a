import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from qinit.files.tensors import StoredTensor
from tests.helpers import weights_of
from tests.models import make_bert, words

QUICK = ("--rank", 4, "--calibration-samples", 6, "--calibration-length", 16, "--out", "out")
TEXT = words(*(4 + i * 37 % 250 for i in range(400)))


def make_encoder(tmp_path):
    return make_bert(tmp_path / "bert", hidden_size=64, intermediate_size=64)


def report():
    return json.loads(Path("out/qinit.json").read_text())


def written():
    """Names below the working directory, hidden ones too."""
    return sorted(path.name for path in Path().iterdir())


class TestSources:
    def test_random_tokens(self, command, strong_reader):
        code, out, err = command("eqft", strong_reader, *QUICK, "--calibration", "random")
        assert (code, err) == (0, "")
        found = report()
        assert found["recipe"]["calibration"] == "random"
        assert found["totals"]["calibration"] == {"text": "6 samples of 16 random tokens, seed 0", "tokens": 96}
        assert {row["tokens"] for row in found["layers"]} == {96}
        assert "calibrated on 6 samples of 16 random tokens, seed 0" in " ".join(out.split())
        start, end = found["totals"]["output_error_start"], found["totals"]["output_error"]
        assert f" of the outputs {start:.4f} base alone -> {end:.4f} with the adapter" in " ".join(out.split())
        assert end < start
        row = found["layers"][0]
        shown = f", of the output {row['output_error_start']:.4f} -> {row['output_error']:.4f}, "
        assert any(row["name"] in line and shown in line for line in out.splitlines())

    def test_the_models_own_text(self, command, strong_reader):
        code, out, err = command("eqft", strong_reader, *QUICK, "--calibration", "self")
        assert (code, err) == (0, "")
        assert "calibrated on 6 texts of 16 tokens that the model wrote itself, seed 0" in " ".join(out.split())
        assert report()["totals"]["calibration"]["tokens"] == 96

    def test_text_that_qinit_brings(self, command, strong_reader):
        Path("text").write_text(TEXT)  # a file of that name is given as ./text
        code, out, err = command("eqft", strong_reader, *QUICK, "--calibration", "text")
        assert (code, err) == (0, "")
        assert "calibrated on 6 windows of 16 tokens from the text that qinit brings, seed 0" in " ".join(out.split())
        assert report()["recipe"]["calibration"] == "text"
        _, out, _ = command("eqft", strong_reader, *QUICK, "--calibration", "./text", "--overwrite")
        assert "calibrated on 6 windows of 16 tokens from text, seed 0" in " ".join(out.split())

    def test_a_text_file(self, command, strong_reader):
        Path("corpus.txt").write_text(TEXT)
        code, out, err = command("eqft", strong_reader, *QUICK, "--calibration", "corpus.txt")
        assert (code, err) == (0, "")
        assert "calibrated on 6 windows of 16 tokens from corpus.txt, seed 0" in " ".join(out.split())

    def test_jsonl_with_a_field_of_another_name(self, command, strong_reader):
        rows = [{"body": TEXT[i : i + 60], "text": "w4"} for i in range(0, 1200, 60)]
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        code, out, err = command("eqft", strong_reader, *QUICK, "--calibration", "rows.jsonl", "--text-field", "body")
        assert (code, err) == (0, "")
        assert "calibrated on 6 windows of 16 tokens from rows.jsonl, seed 0" in " ".join(out.split())
        with_body = weights_of(Path("out"))
        assert command("eqft", strong_reader, *QUICK, "--calibration", "rows.jsonl", "--overwrite")[0] == 0
        assert weights_of(Path("out")) != with_body  # a text of w4 alone

    def test_an_encoder_reads_padded_documents(self, command, tmp_path):
        bert = make_encoder(tmp_path)
        Path("corpus.txt").write_text("\n\n".join(words(*range(4 + i, 8 + 3 * i)) for i in range(6)))
        code, out, err = command("eqft", bert, *QUICK, "--calibration", "corpus.txt")
        assert (code, err) == (0, "")
        assert "calibrated on 6 texts of up to 16 tokens from corpus.txt, seed 0" in " ".join(out.split())
        assert report()["totals"]["calibration"]["tokens"] < 96  # padding does not count

    def test_every_option_reaches_the_recipe_and_the_recipe_repeats_the_run(self, command, strong_reader):
        options = {
            **{"calibration": "random", "calibration_samples": 4, "calibration_length": 8, "iter": 3, "rank": 4},
            **{"calibration_mode": "parallel", "rounding": "nearest", "act_order": True, "polish": 2},
        }
        flags = []
        for name, value in options.items():
            flags += [f"--{name.replace('_', '-')}"] + ([] if value is True else [value])
        assert command("eqft", strong_reader, *flags, "--out", "out")[0] == 0
        recipe = report()["recipe"]
        assert recipe == {**recipe, **options}
        Path("again.yaml").write_text(yaml.safe_dump(recipe))
        assert command("eqft", "--recipe", "again.yaml", "--out", "again")[0] == 0
        assert weights_of(Path("out")) == weights_of(Path("again"))

    def test_few_tokens_are_said_on_the_screen_in_the_report_and_in_the_card(self, command, strong_reader):
        note = (
            "calibration: 96 tokens are fewer than the 128 inputs of the widest layer, so H is singular and damped "
            "more; 1024 or more are better: give --calibration-samples 64"
        )
        _, out, _ = command("eqft", strong_reader, *QUICK, "--calibration", "random", "--dry-run")
        assert f"note: {note}\n" in out
        _, out, _ = command("eqft", strong_reader, *QUICK, "--calibration", "random")
        assert f"note: {note}\n" in out
        assert note in report()["notes"]
        assert f"- {note}\n" in Path("out/README.md").read_text()
        _, out, _ = command(
            "eqft", strong_reader, *QUICK, "--calibration", "random", "--calibration-samples", 8, "--overwrite"
        )
        assert report()["totals"]["calibration"]["tokens"] == 128
        assert "fewer than" not in out + "".join(report()["notes"])

    def test_json_and_quiet_print_nothing_else(self, command, strong_reader):
        code, out, err = command("eqft", strong_reader, *QUICK, "--calibration", "random", "--json", "--quiet")
        assert (code, err) == (0, "")
        assert json.loads(out)["totals"]["calibration"]["tokens"] == 96
        code, out, err = command("eqft", strong_reader, *QUICK, "--calibration", "self", "--quiet", "--overwrite")
        assert (code, out, err) == (0, "", "")


class TestPolish:
    def test_it_runs_and_reports(self, command, strong_reader):
        options = ("--calibration-samples", 128, "--calibration-length", 32, "--calibration-mode", "parallel")
        code, out, err = command("eqft", strong_reader, *QUICK, "--calibration", "random", *options, "--polish", 5)
        assert (code, err) == (0, "")
        found = report()["totals"]["calibration"]["polish"]
        assert found["kept"]
        assert found["steps"] == 5
        assert found["held_out_after"] < found["held_out_before"]
        before, after = f"{found['held_out_before']:.4f}", f"{found['held_out_after']:.4f}"
        assert f"polish, step 0: loss {before}, held out {before}\n" in out
        assert f", held out {after}\n" in out
        assert f" polish 5 steps, held-out loss {before} -> {after}" in " ".join(out.split())
        assert f"| polish | 5 steps, held-out loss {before} -> {after} |\n" in Path("out/README.md").read_text()


class TestPlan:
    def test_auto_is_the_models_own_text_where_that_is_quick(self, command, strong_reader, auto, monkeypatch):
        def refuse(*_):
            raise AssertionError("a weight was read")

        monkeypatch.setattr(StoredTensor, "read", refuse)
        code, out, err = command("eqft", strong_reader, "--dry-run")
        assert (code, err, written()) == (0, "", [])
        assert "note: calibration self: on text that the model writes itself, 128 samples of 128 tokens (16384)" in out
        row = next(line for line in out.splitlines() if line.startswith(" calibration "))
        assert row.split(maxsplit=1)[1].strip() == "self, 128 samples of up to 512 tokens"

    def test_auto_is_text_for_an_encoder(self, command, auto, tmp_path):
        code, out, _ = command("eqft", make_encoder(tmp_path), "--dry-run")
        assert code == 0
        assert "note: calibration text: on text that qinit brings, 128 samples of 32 tokens (4096), about 1 s at" in out
        assert "; the model writes no text of its own\n" in out

    def test_auto_is_less_text_where_it_would_take_long(self, command, strong_reader, auto):
        _, out, _ = command("eqft", strong_reader, "--dry-run", "--calibration-budget", "0.01s")
        assert "note: calibration text: on text that qinit brings, 32 samples of 128 tokens (4096), about 1 s at" in out
        assert "128 samples of text that the model writes itself would take 1 s, over --calibration-budget 0.01s" in out
        row = next(line for line in out.splitlines() if line.startswith(" calibration "))
        assert row.split(maxsplit=1)[1].strip() == "text, 32 samples of up to 512 tokens"

    def test_auto_is_none_at_four_bits_where_it_would_take_long(self, command, strong_reader, auto):
        _, out, _ = command("eqft", strong_reader, "--bits", 4, "--dry-run", "--calibration-budget", "0.01s")
        assert "note: no calibration: 128 samples of text that the model writes itself would take 1 s, over" in out
        assert "; give --calibration text to have it\n" in out
        assert ["calibration", "none"] in map(str.split, out.splitlines())

    @pytest.mark.parametrize(
        ("kind", "chosen", "said"), [("llama", "self", "itself"), ("bert", "text", "qinit brings")]
    )
    def test_json_has_the_choice_and_the_reason(self, command, strong_reader, auto, tmp_path, kind, chosen, said):
        model = strong_reader if kind == "llama" else make_encoder(tmp_path)
        code, out, _ = command("eqft", model, "--dry-run", "--json")
        plan = json.loads(out)
        assert code == 0
        assert plan["recipe"]["calibration"] == chosen
        assert [note for note in plan["notes"] if said in note and "calibration" in note]

    def test_auto_carries_out_what_it_plans(self, command, strong_reader, auto):
        code, out, _ = command("eqft", strong_reader, *QUICK)
        assert code == 0
        first = out.splitlines()[0]
        assert first.startswith("note: calibration self: on text that the model writes itself, 6 samples of 16 tokens")
        assert report()["recipe"]["calibration"] == "self"
        assert "that the model wrote itself" in report()["totals"]["calibration"]["text"]
        assert "- calibration self: on text that the model writes itself" in Path("out/README.md").read_text()

    def test_what_was_asked_for_has_no_reason_but_is_in_the_plan(self, command, strong_reader, auto):
        options = ("--calibration", "random", "--polish", 7, "--calibration-samples", 8)
        _, out, _ = command("eqft", strong_reader, *QUICK, *options, "--dry-run")
        assert "random, 8 samples of up to 16 tokens, then 7 steps of polish" in out
        assert "model writes itself" not in out
        assert "note:" not in out
        assert re.search(r"time +about \d+ s here \(\d+ s to [a-z ]+(, \d+ s to [a-z ]+)*\)", out)

    def test_the_cost_is_said_before_the_start(self, command, strong_reader, auto):
        options = ("--calibration", "random", "--polish", 1, "--calibration-samples", 8)
        _, out, _ = command("eqft", strong_reader, *QUICK, *options)
        first = next(line for line in out.splitlines() if line.startswith("note:"))
        assert re.fullmatch(r"note: this run takes about \d+ s here \(.+\)", first)


def test_an_interrupt_during_the_walk_leaves_nothing(command, strong_reader, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("qinit.calibration.walk.Meter.add", interrupt)
    code, _, err = command("eqft", strong_reader, *QUICK, "--calibration", "random")
    assert (code, err, written()) == (130, "error: interrupted; nothing was left behind\n", [])


def test_a_failing_polish_leaves_the_layers_only(command, strong_reader, monkeypatch):
    monkeypatch.setattr("qinit.train.polish.divergence", lambda *_: torch.zeros(()).fail)
    code, _, err = command("eqft", strong_reader, *QUICK, "--calibration", "random", "--polish", 2)
    assert (code, written()) == (1, [".out.partial"])
    assert err.startswith("error: inside qinit: AttributeError")
    assert err.endswith("; 14 of 14 layers are kept, the same command goes on from there\n")


class TestHub:
    def test_the_token_reaches_the_data_set_and_nothing_that_is_written(self, command, strong_reader, monkeypatch):
        seen = []

        def read_hub(source, text_field, token, **_):
            seen.append((source, text_field, token))
            return [TEXT]

        monkeypatch.setattr("qinit.text.sources.read_hub", read_hub)
        options = ("--calibration", "someone/texts", "--text-field", "body", "--token", "hf_secret", "--json")
        code, out, err = command("eqft", strong_reader, *QUICK, *options)
        assert code == 0
        assert seen == [("someone/texts", "body", "hf_secret")]
        assert report()["totals"]["calibration"]["text"] == "6 windows of 16 tokens from someone/texts, seed 0"
        texts = [file.read_text() for file in Path("out").rglob("*") if file.suffix in (".json", ".md")]
        assert "hf_secret" not in "".join(texts) + out + err
