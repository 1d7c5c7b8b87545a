"""The tokenizer and the calibration text."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

from tests.cli.hostile.world import EQFT, PLAN, World, add, at, beside, edit_config, fifo, folder, instead, sparse, text

ON_TEXT = ("--calibration", "text.txt", "--calibration-samples", "2", "--calibration-length", "8")


WORDS = "w5 w6 w7 w8 " * 50


def with_text(damage: Callable[[World], object], content: bytes = WORDS.encode()) -> Callable[[World], object]:
    return lambda world: ((world.here / "text.txt").write_bytes(content), damage(world))


def broken_ids(world: World) -> None:
    file = world.model / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"]["vocab"] = {token: 10**6 + number for token, number in values["model"]["vocab"].items()}
    file.write_text(json.dumps(values))


NO_TOKENIZER = "no tokenizer that transformers can load"


for name, damage, says in (
    ("garbage", beside("tokenizer.json", b"\x80\x04garbage"), NO_TOKENIZER),
    ("cut", lambda w: os.truncate(w.model / "tokenizer.json", 100), NO_TOKENIZER),
    ("a list", beside("tokenizer.json", b"[]"), NO_TOKENIZER),
    ("deep nesting", beside("tokenizer.json", b"[" * 100_000), NO_TOKENIZER),
    ("300 MB", sparse("model/tokenizer.json", 300_000_000), "tokenizer.json: has 300.0 MB, at most 268.4 MB are read"),
    ("a pipe", instead("tokenizer.json", fifo), "tokenizer"),
    ("its configuration is a list", beside("tokenizer_config.json", b"[]"), NO_TOKENIZER),
    (
        *("code of its own", beside("tokenizer_config.json", b'{"tokenizer_class":"Own","auto_map":{"AutoTokenizer":'
        b'["own.T",null]}}')), "tokenizer_config.json: needs code that the checkpoint brings",
    ),
):  # fmt: skip
    add(f"tokenizer: {name}", says, with_text(damage), (*PLAN, *ON_TEXT), (*EQFT, *ON_TEXT))


add(
    "tokenizer: ids that the model lacks",
    "the tokenizer is that of another model",
    with_text(broken_ids),
    (*EQFT, *ON_TEXT),
)


def listening(path: Path, world: World) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)


for name, file, damage, says in (
    ("NULs", "a.txt", text("a.txt", b"abc\0def"), "a.txt: no text (byte 3 is NUL)"),
    ("UTF-16", "a.txt", text("a.txt", "words".encode("utf-16-le")), "no text (byte 1 is NUL)"),
    ("not UTF-8", "a.txt", text("a.txt", b"w5 \xff"), "not UTF-8 text (byte 3 cannot be decoded)"),
    ("gzip", "a.txt", text("a.txt", b"\x1f\x8b\x08" + b"x" * 99), "not UTF-8 text (byte 1 cannot be decoded)"),
    ("empty", "a.txt", text("a.txt", b""), "holds no text (it is empty)"),
    ("4 GB", "a.txt", sparse("a.txt", 4 << 30), "has 4295.0 MB, at most 1073.7 MB are read"),
    ("pipe", "a.txt", at("a.txt", fifo), "a.txt: cannot be read (not a regular file)"),
    ("socket", "a.txt", at("a.txt", listening), "a.txt: cannot be read ("),
    ("folder", "a.txt", at("a.txt", folder), "a.txt: is a directory"),
    ("endless device", "/dev/zero", lambda w: None, "/dev/zero: cannot be read (not a regular file)"),
    ("dangling link", "a.txt", at("a.txt", lambda path, w: path.symlink_to("gone")), "a.txt: no such file"),
):
    source = ("--calibration", file)
    add(f"text: {name}", says, damage, (*PLAN, *source), (*EQFT, *source))


for name, content, says in (
    ("no JSON", b'{"text":"w5"}\nw6\n', "rows.jsonl, line 2: not valid JSON"),
    ("deep nesting", b'{"text":' + b"[" * 100_000, "rows.jsonl, line 1: not valid JSON (nested too deeply)"),
    ("a list", b"[1]", "line 1: expected an object with a field 'text', found list"),
    ("a number as text", b'{"text":5}', "field 'text' holds int, expected text"),
    ("another field", b'{"\\u001b[2J":"w5"}', "its fields are \\x1b[2J; choose one with --text-field"),
    ("half a surrogate", b'{"text":"\\ud83d"}', "line 1: not valid JSON (half of a surrogate pair"),
    ("a field twice", b'{"text":"a","text":"b"}', "'text' stands there twice"),
    ("5 million lists", b'{"text":[' + b"[]," * 5_000_000 + b"0]}", "more than 4000000 values"),
    ("a long name", b'{"' + b"x" * 1_000_000 + b'":1}', "no field 'text'"),
):
    add(f"rows: {name}", says, text("rows.jsonl", content), (*EQFT, "--calibration", "rows.jsonl"))


for name, damage, says in (
    ("broken generation_config", beside("generation_config.json", b"{"), "generation_config.json: not valid JSON"),
    ("start token of 10^30", edit_config(bos_token_id=10**30, eos_token_id=10**30), "config.json"),
):
    if name == "start token of 10^30":
        damage = lambda w, inner=damage: (inner(w), (w.model / "generation_config.json").unlink())  # noqa: E731
    add(f"self: {name}", says, damage, (*PLAN, "--calibration", "self"), (*EQFT, "--calibration", "self"))
