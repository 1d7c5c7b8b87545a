"""What calibration refuses: one line, exit code 2, and nothing is left."""

import json
from pathlib import Path

import pytest
import safetensors.torch

from tests.cli.test_calibration import QUICK, TEXT, make_encoder, written

# Bad input: files to write first, the options, and what the one line on stderr says.
BAD_INPUT = {
    "missing file": ({}, ["--calibration", "gone.txt"], "gone.txt: no such file; SOURCE may be a text file"),
    "directory": ({}, ["--calibration", "."], ".: is a directory; give one text file or JSONL file"),
    "empty file": ({"a.txt": ""}, ["--calibration", "a.txt"], "a.txt: holds no text (it is empty)"),
    "blank file": ({"a.txt": " \n\n"}, ["--calibration", "a.txt"], "a.txt: holds no text"),
    "blank rows": (
        *({"a.jsonl": '{"text": " "}\n{"text": ""}\n'}, ["--calibration", "a.jsonl"]),
        "a.jsonl: field 'text' holds no text in any of its rows",
    ),
    "broken JSONL": ({"a.jsonl": "{\n"}, ["--calibration", "a.jsonl"], "a.jsonl, line 1: not valid JSON"),
    "unknown field": (
        *({"a.jsonl": '{"body": "w4"}\n'}, ["--calibration", "a.jsonl", "--text-field", "boddy"]),
        "a.jsonl, line 1: no field 'boddy' (did you mean 'body'?)",
    ),
    "field of self": (
        *({}, ["--calibration", "self", "--text-field", "body"]),
        "text_field: there is no field to name in calibration self",
    ),
    "budget": (
        *({}, ["--calibration-budget", "soon"]),
        "calibration_budget: expected a time like 10m, 90s or 1h, found 'soon'",
    ),
    "field of auto": ({}, ["--text-field", "body"], "text_field: there is no field to name in calibration auto"),
    "field of plain text": (
        *({"a.txt": "w4 w5"}, ["--calibration", "a.txt", "--text-field", "body"]),
        "a.txt: has no field 'body'; a text field is for JSONL (.jsonl or .json) and data sets",
    ),
    "mode": (
        *({}, ["--calibration", "random", "--calibration-mode", "serial"]),
        "calibration_mode: input should be 'sequential' or 'parallel', found 'serial'",
    ),
    "rounding": (
        *({}, ["--calibration", "random", "--rounding", "up"]),
        "rounding: input should be 'gptq' or 'nearest', found 'up'",
    ),
    "length": (
        *({}, ["--calibration", "random", "--calibration-length", 1]),
        "calibration_length: input should be greater than or equal to 2, found 1",
    ),
    "samples": (
        *({}, ["--calibration", "random", "--calibration-samples", 0]),
        "calibration_samples: input should be greater than or equal to 1, found 0",
    ),
    "negative polish": (
        *({}, ["--calibration", "random", "--polish", -1]),
        "polish: input should be greater than or equal to 0, found -1",
    ),
    "polish of one sample": (
        *({}, ["--calibration", "random", "--polish", 3, "--calibration-samples", 1]),
        "polish: needs at least 2 samples, one to learn from and one to check on, found 1 (1 samples of 16 random",
    ),
    "polish without calibration": (
        *({}, ["--calibration", "none", "--polish", 5]),
        "polish: needs calibration, which is none",
    ),
    "rounding without calibration": (
        *({}, ["--calibration", "none", "--rounding", "gptq"]),
        "rounding: needs calibration, which is none",
    ),
    "order without calibration": (
        *({}, ["--calibration", "none", "--act-order"]),
        "act_order: needs calibration, which is none",
    ),
    "method that needs it": (
        *({"r.yaml": "method: qera\ncalibration: none\n"}, ["--recipe", "r.yaml"]),
        "r.yaml: calibration: method qera needs it (self, text, a text file, ...), found none",
    ),
    "method that needs it, auto": (
        *({"r.yaml": "method: qera\n"}, ["--recipe", "r.yaml"]),
        "calibration: method qera needs it; give --calibration self, text or a text file",
    ),
    "method that takes none": (
        *({"r.yaml": "method: loftq\nformat: dense\n"}, ["--recipe", "r.yaml", "--calibration", "random"]),
        "calibration: method loftq looks at weights alone; leave it out or give none",
    ),
    "polish of a method that takes none": (
        *({"r.yaml": "method: loftq\nformat: dense\n"}, ["--recipe", "r.yaml", "--polish", 2]),
        "polish: needs calibration, and there is none",
    ),
    "rounding of a method with its own": (
        *({"r.yaml": "method: eora\n"}, ["--recipe", "r.yaml", "--calibration", "random", "--rounding", "nearest"]),
        "rounding: method eora has its own; leave it out",
    ),
}
# What only shows when the text is read.
SEEN_LATE = {"broken JSONL", "blank rows", "unknown field", "polish of one sample"}


def overflow(model):
    """Make what the second block's layers read infinite."""
    tensors = safetensors.torch.load_file(model / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"].fill_(3e38)
    safetensors.torch.save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def assert_refused(result, message, left, solved=False):
    code, out, err = result
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert code == 2
    assert "Load it" not in out
    assert solved or "%" not in out  # found before the first layer is solved
    assert written() == left


@pytest.mark.parametrize(("files", "options", "message"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_one_line_and_leaves_nothing(command, strong_reader, files, options, message):
    for name, text in files.items():
        Path(name).write_text(text)
    assert_refused(command("eqft", strong_reader, *QUICK, *options), message, sorted(files))


@pytest.mark.parametrize("name", [name for name in BAD_INPUT if name not in SEEN_LATE])
def test_bad_input_is_seen_by_the_dry_run_too(command, strong_reader, name):
    files, options, message = BAD_INPUT[name]
    for file, text in files.items():
        Path(file).write_text(text)
    assert_refused(command("eqft", strong_reader, *QUICK, *options, "--dry-run"), message, sorted(files))


def test_text_without_tokens(command, tiny_reader):
    tokenizer = json.loads((tiny_reader / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "*"}, "content": " "}
    (tiny_reader / "tokenizer.json").write_text(json.dumps(tokenizer))
    Path("stars.txt").write_text("* * *\n")
    result = command("eqft", tiny_reader, *QUICK, "--calibration", "stars.txt")
    assert_refused(result, "stars.txt: the model's tokenizer makes no tokens of this text", ["stars.txt"])


def test_a_text_for_a_model_without_a_tokenizer(command, tiny_llama):
    Path("a.txt").write_text(TEXT)
    result = command("eqft", tiny_llama, *QUICK, "--calibration", "a.txt")
    assert_refused(result, "no tokenizer", ["a.txt"])


def test_self_for_an_encoder(command, tmp_path):
    bert = make_encoder(tmp_path)
    result = command("eqft", bert, *QUICK, "--calibration", "self")
    assert_refused(result, "`self` needs a causal language model", [])


@pytest.mark.parametrize("asked", ["--polish=3", "--rounding=nearest", "--act-order"])
def test_what_needs_calibration_where_auto_finds_none(command, auto, tmp_path, asked):
    result = command("eqft", make_encoder(tmp_path), *QUICK, asked, "--bits", 4, "--calibration-budget", "0.000001s")
    assert_refused(result, "needs calibration, and there is none: the model writes no text of its own", [])


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_a_model_that_overflows_halfway_leaves_nothing(command, tiny_llama, mode):
    overflow(tiny_llama)
    result = command("eqft", tiny_llama, *QUICK, "--calibration", "random", "--calibration-mode", mode)
    assert_refused(result, "NaN or Inf at its input in sample ", [], solved=True)
    assert "model.layers.1." in result[2]
    assert "%" in result[1]  # the first block had been solved


def test_a_model_that_cannot_write_its_own_text_leaves_nothing(command, tiny_reader):
    overflow(tiny_reader)
    result = command("eqft", tiny_reader, *QUICK, "--calibration", "self")
    assert_refused(result, "the model predicts NaN or Inf in torch.float32", [])
