"""Hostile files by name: what is done to a good model's surroundings, what reads it, and what the error says."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qinit.report import LayerRow, Report

NORM, UP, HEAD = "model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"
INDEX = "model.safetensors.index.json"
SECRET = "the secret"


@dataclass(frozen=True)
class World:
    """Where a case happens: `model` is a good model that it may damage, `outside` holds what is nobody's business; the
    commands run in `here`."""

    model: Path
    outside: Path
    here: Path


@dataclass(frozen=True)
class Case:
    """`commands` are each refused with `says`, in the same surroundings."""

    damage: Callable[[World], object]
    says: str
    commands: tuple[tuple[str, ...], ...]


CASES: dict[str, Case] = {}
PLAN, EQFT = ("plan", "{model}"), ("eqft", "{model}", "--out", "out")


def add(name: str, says: str, damage: Callable[[World], object], *commands: tuple[str, ...]) -> None:
    assert name not in CASES, name
    CASES[name] = Case(damage, says, commands or (PLAN, EQFT))


# --- a safetensors file -------------------------------------------------------------------------------------------


def raw_file(header: bytes, data: bytes = b"", length: int | None = None) -> Callable[[World], object]:
    prefix = (len(header) if length is None else length).to_bytes(8, "little")
    return lambda world: (world.model / "model.safetensors").write_bytes(prefix + header + data)


def entry(text: bytes) -> Callable[[World], object]:
    """A file of one tensor, `x`, with this entry and 8 bytes of data."""
    return raw_file(b'{"x":' + text + b"}", b"\0" * 8)


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[World], object]:
    """Change the good file's header; its data stay."""

    def damage(world: World) -> None:
        file = world.model / "model.safetensors"
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        values = json.loads(raw[8 : 8 + length])
        change(values)
        new = json.dumps(values).encode()
        file.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + length :])

    return damage


def shift(name: str, by: int) -> Callable[[World], object]:
    return header(lambda h: h[name].update(data_offsets=[place + by for place in h[name]["data_offsets"]]))


def sparse(name: str, size: int, head: bytes = b"") -> Callable[[World], object]:
    """A file of a size that takes no space."""

    def damage(world: World) -> None:
        with (world.here / name if "/" not in name else world.model / name.split("/")[1]).open("wb") as handle:
            handle.write(head)
            handle.truncate(size)

    return damage


def empty_target(world: World) -> None:
    edit_config(intermediate_size=0)(world)

    def change(values: dict[str, Any]) -> None:
        start = 0
        for name, value in values.items():
            if name == "__metadata__":
                continue
            if ".mlp." in name:
                value["shape"] = [64, 0] if "down" in name else [0, 64]
            size = 2
            for count in value["shape"]:
                size *= count
            value["data_offsets"] = [start, start + size]
            start += size
        total.append(start)

    total: list[int] = []
    header(change)(world)
    file = world.model / "model.safetensors"
    length = int.from_bytes(file.read_bytes()[:8], "little")
    os.truncate(file, 8 + length + total[0])


X = b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
CORRUPT = "model.safetensors: corrupt safetensors header"
COUNTS = "'x' has a shape or offset that is no count"
for name, damage, says in (
    ("empty file", lambda w: (w.model / "model.safetensors").write_bytes(b""), "not a whole safetensors file"),
    ("seven bytes", lambda w: (w.model / "model.safetensors").write_bytes(b"\1" * 7), "not a whole safetensors file"),
    ("length of 2^64-1", raw_file(b"{}", length=2**64 - 1), "header of 18446744073709551615 bytes"),
    ("length one too large", raw_file(b"{}", length=3), "header of 3 bytes in a file of 10"),
    ("length of 0", raw_file(b""), f"{CORRUPT} (Expecting value"),
    ("length above the limit", sparse("model/model.safetensors", 1 << 33, b"\0\0\0\0\1\0\0\0"), "not a whole safeten"),
    ("90 MB of NULs", sparse("model/model.safetensors", 90_000_008, (90_000_000).to_bytes(8, "little")), CORRUPT),
    ("not UTF-8", raw_file(b'{"\xff":1}'), "can't decode byte 0xff"),
    ("UTF-16", raw_file('{"x":1}'.encode("utf-16")), "can't decode byte 0xff"),
    ("a list", raw_file(b"[]"), "expected an object"),
    ("deep nesting", raw_file(b"[" * 100_000), "nested too deeply"),
    ("deep metadata", raw_file(b'{"__metadata__":' + b"[" * 70 + b"]" * 70 + b"}"), "nested more than 64 deep"),
    ("5 million lists", raw_file(b"[" + b"[]," * 5_000_000 + b"0]"), "more than 4000000 values"),
    (
        *("a million tensors", raw_file(b"{" + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i
        for i in range(1_000_000)) + b"}")), "more than 4000000 values",
    ),
    ("a name twice", raw_file(b'{"x":' + X + b',"x":' + X + b"}", b"\0" * 8), "'x' stands there twice"),
    ("half a surrogate", raw_file(b'{"\\ud800":' + X + b"}", b"\0" * 8), "half of a surrogate pair"),
    ("offset before the file", shift(NORM, -(1 << 30)), f"'{NORM}' has a shape or offset that is no count"),
    ("offset behind the file", shift(NORM, 1 << 30), "overlaps another or leaves a gap"),
    ("overlap", shift(NORM, -8), "overlaps another or leaves a gap"),
    ("end before begin", entry(X.replace(b"[0,8]", b"[8,0]")), "takes 8 bytes, not -8"),
    ("three offsets", entry(X.replace(b"[0,8]", b"[0,8,9]")), "'x' lacks dtype, shape or data_offsets"),
    ("offset of 5000 digits", entry(X.replace(b",8]", b"," + b"9" * 5000 + b"]")), "4300 digits"),
    ("offset of 20 digits", entry(X.replace(b",8]", b"," + b"9" * 20 + b"]")), COUNTS),
    ("offset 8.0", entry(X.replace(b",8]", b",8.0]")), COUNTS),
    ("offset Infinity", entry(X.replace(b",8]", b",Infinity]")), COUNTS),
    ("shape NaN", entry(X.replace(b"[2]", b"[NaN]")), COUNTS),
    ("shape true", entry(X.replace(b"[2]", b"[true]")), COUNTS),
    ("shape is text", entry(X.replace(b"[2]", b'"2"')), COUNTS),
    ("shape of 100000 dimensions", entry(X.replace(b"[2]", b"[" + b"9," * 99_999 + b"9]")), COUNTS),
    ("shape that overflows", entry(X.replace(b"[2]", b"[%d,%d]" % (2**59, 2**59))), "bytes, not 8"),
    ("dtype null", entry(X.replace(b'"F32"', b"null")), "'x' has dtype None"),
    ("dtype unknown", entry(X.replace(b"F32", b"F128")), "'x' has dtype 'F128', known are"),
    ("entry is a list", entry(b"[1,2,3]"), "'x' lacks dtype, shape or data_offsets"),
    ("no tensors", raw_file(b"{}"), "its safetensors hold no tensors"),
    ("data behind the last tensor", raw_file(b'{"x":' + X + b"}", b"\0" * 9), "the header describes"),
    ("size mismatch", header(lambda h: h[NORM].update(shape=[65])), "of shape [65] takes 130 bytes, not 128"),
    ("empty target", empty_target, "is empty"),
    ("integer target", header(lambda h: h[UP].update(dtype="I16")), f"'{UP}' is torch.int16; qinit reads"),
    ("name of a target in capitals", header(lambda h: h.update({UP.upper(): h.pop(UP)})), "no weight for module"),
    (
        *("name that clears the screen", header(lambda h: h.update({"\x1b[2J\n": h.pop(NORM) | {"dtype": "Q7"}}))),
        "tensor '\\x1b[2J ' has dtype 'Q7'",
    ),
):  # fmt: skip
    add(f"header: {name}", says, damage)


# --- the index ----------------------------------------------------------------------------------------------------


def placed(place: Any, tensor: str = NORM) -> Callable[[World], object]:
    """Shards, one of which the index names `place`."""

    def damage(world: World) -> None:
        names = shard(world)
        write_index(world, {**dict.fromkeys(names, "part.safetensors"), tensor: place})

    return damage


def shard(world: World) -> list[str]:
    """Turn the model into one shard, `part.safetensors`; returns its tensors' names."""
    file = (world.model / "model.safetensors").rename(world.model / "part.safetensors")
    raw = file.read_bytes()
    names = [name for name in json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]) if name != "__metadata__"]
    write_index(world, dict.fromkeys(names, "part.safetensors"))
    return names


def write_index(world: World, weight_map: Any) -> None:
    (world.model / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def index(text: bytes) -> Callable[[World], object]:
    def damage(world: World) -> None:
        shard(world)
        (world.model / INDEX).write_bytes(text)

    return damage


def instead(name: str, make: Callable[[Path, World], object], sharded: bool = False) -> Callable[[World], object]:
    """Put something else in a file's place; the file itself moves outside."""

    def damage(world: World) -> None:
        if sharded:
            shard(world)
        path = world.model / name
        if path.exists():
            path.rename(world.outside / "moved")
        make(path, world)

    return damage


def link_out(path: Path, world: World) -> None:
    path.symlink_to(world.outside / "moved")


def loop(path: Path, world: World) -> None:
    path.symlink_to(path.name)


def circle(path: Path, world: World) -> None:
    other = path.with_name("other")
    path.symlink_to(other)
    other.symlink_to(path)


def fifo(path: Path, world: World) -> None:
    os.mkfifo(path)


def folder(path: Path, world: World) -> None:
    path.mkdir()


def device(path: Path, world: World) -> None:
    path.symlink_to("/dev/zero")


PART, OUT_OF = "part.safetensors", "a link that leads out of the directory, to "
for name, damage, says in (
    ("leaves by ..", placed("../outside/moved"), "'../outside/moved', which is no plain file name"),
    ("leaves by root", placed("/etc/passwd"), "'/etc/passwd', which is no plain file name"),
    ("names a folder below", placed("a/b"), "'a/b', which is no plain file name"),
    ("names nothing", placed(""), "placed in '', which is no plain file name"),
    ("names .", placed("."), "placed in '.', which is no plain"),
    ("names ..", placed(".."), "placed in '..', which is no plain"),
    ("names a number", placed(3), "placed in 3, which is no plain file name"),
    ("names a list", placed(["part.safetensors"]), "which is no plain file name"),
    ("names a NUL", placed("a\0b"), "which is no plain file name"),
    ("names a line end", placed("a\nb"), "which is no plain file name"),
    ("names 10000 characters", placed("x" * 10_000), "which is no plain file name"),
    ("names a file in capitals", placed("PART.safetensors"), "PART.safetensors: missing, but"),
    ("places a tensor where it is not", placed(PART, "ghost"), "part.safetensors: lacks tensor 'ghost'"),
    ("no weight_map", index(b"{}"), "has no weight_map"),
    ("empty weight_map", index(b'{"weight_map":{}}'), "has no weight_map"),
    ("weight_map is a list", index(b'{"weight_map":["a"]}'), "has no weight_map"),
    ("a list", index(b"[]"), "expected a JSON object, found list"),
    ("no JSON", index(b"{'a'}"), "not valid JSON"),
    ("a tensor twice", index(b'{"weight_map":{"a":"x","a":"y"}}'), "'a' stands there twice"),
    ("deep", index(b'{"weight_map":' * 100_000), "nested too deeply"),
    ("5 million entries", index(b'{"weight_map":[' + b"1," * 5_000_000 + b"1]}"), "more than 4000000 values"),
    ("1 GB", sparse("model/" + INDEX, 10**9), "at most 67.1 MB are read"),
    ("link that leaves", instead(INDEX, link_out, sharded=True), OUT_OF),
    ("pipe", instead(INDEX, fifo, sharded=True), "model.safetensors.index.json: cannot be read (not a regular file)"),
    ("shard: link that leaves", instead(PART, link_out, sharded=True), OUT_OF),
    ("shard: link to itself", instead(PART, loop, sharded=True), "part.safetensors: Too many levels of symbolic links"),
    ("shard: links in a circle", instead(PART, circle, sharded=True), "Too many levels of symbolic links"),
    ("shard: pipe", instead(PART, fifo, sharded=True), "part.safetensors: not a regular file"),
    ("shard: folder", instead(PART, folder, sharded=True), "part.safetensors: not a regular file"),
    ("shard: endless device", instead(PART, device, sharded=True), f"{OUT_OF}/dev/zero"),
):
    if name == "1 GB":
        inner, damage = damage, lambda w, inner=damage: (shard(w), inner(w))
    add(f"index: {name}", says, damage)
SINGLE = "model.safetensors"
for name, make, says in (
    ("link that leaves", link_out, OUT_OF),
    ("dangling link", lambda path, w: path.symlink_to("gone"), "model.safetensors: missing, but"),
    ("pipe", fifo, "model.safetensors: not a regular file"),
    ("folder", folder, "model.safetensors: not a regular file"),
):
    add(f"weights: {name}", says, instead(SINGLE, make))


# --- config.json and what lies beside it --------------------------------------------------------------------------


def edit_config(**changes: Any) -> Callable[[World], object]:
    def damage(world: World) -> None:
        file = world.model / "config.json"
        values = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return damage


def beside(name: str, content: bytes) -> Callable[[World], object]:
    return lambda world: (world.model / name).write_bytes(content)


def write_config(content: bytes) -> Callable[[World], object]:
    return beside("config.json", content)


def many_files(world: World) -> None:
    (world.model / "many").mkdir()
    for number in range(10_001):
        (world.model / "many" / str(number)).touch()


BILLION = 10**9
OTHER_MODEL = "config and weights belong to different models"
MOE = {
    **{"model_type": "switch_transformers", "architectures": ["SwitchTransformersEncoderModel"], "d_model": 64},
    **{"d_ff": 8, "num_layers": 2, "num_sparse_encoder_layers": 2, "num_heads": 2, "d_kv": 8, "num_experts": BILLION},
}
for name, damage, says in (
    ("a billion layers", edit_config(num_hidden_layers=BILLION), "num_hidden_layers is 1000000000, but the checkpoint"),
    ("a billion layers, as 1e9", edit_config(num_hidden_layers=1e9), "num_hidden_layers is 1000000000.0, but"),
    ("layers without end", edit_config(num_hidden_layers=float("inf")), "num_hidden_layers is inf, but the checkpoint"),
    ("a billion layers, further down", edit_config(text_config={"n_layer": BILLION}), "n_layer is 1000000000, but"),
    ("a billion layers, in a list", edit_config(vision=[{"depths": [2, BILLION]}]), "depths is 1000000000, but"),
    ("a thousand layers", edit_config(num_hidden_layers=1000), "describes more than 10000 modules, but the checkpoint"),
    ("three layers", edit_config(num_hidden_layers=3), "no weight for module 'model.layers.2.self_attn.q_proj'"),
    ("layers as text", edit_config(num_hidden_layers="two"), "num_hidden_layers"),
    ("layers as a list", edit_config(num_hidden_layers=[2]), "num_hidden_layers"),
    ("minus one layers", edit_config(num_hidden_layers=-1), "no linear module is left to quantize"),
    ("a billion labels", edit_config(num_labels=BILLION), "num_labels is 1000000000, but no tensor of the checkpoint"),
    ("a billion positions", edit_config(max_position_embeddings=BILLION), "at most 16777216 are read"),
    (
        *("a billion experts", write_config(json.dumps(MOE).encode())),
        "describes more than 10000 modules",
    ),
    ("width of 10^12", edit_config(hidden_size=10**12), "config.json"),
    ("width of 10^30", edit_config(hidden_size=10**30), "config.json"),
    ("width of 1.5", edit_config(hidden_size=1.5), "hidden_size"),
    ("width of -64", edit_config(hidden_size=-64), "config.json"),
    ("vocabulary of 10^15", edit_config(vocab_size=10**15), OTHER_MODEL),
    ("vocabulary of 10", edit_config(vocab_size=10), "tensor 'model.embed_tokens.weight' has shape [256, 64]"),
    ("no heads", edit_config(num_attention_heads=0), "config.json"),
    ("heads of 10^12", edit_config(head_dim=10**12), "describes buffers of more than 1.1 GB ('inv_freq' and others)"),
    ("middle of 10^30", edit_config(intermediate_size=10**30), "config.json"),
    ("unknown type", edit_config(model_type="nosuch"), "does not know this model (model_type 'nosuch')"),
    ("type is a list", edit_config(model_type=["llama"]), "does not know this model"),
    ("neither type nor class", write_config(b"{}"), "does not know this model (model_type None)"),
    ("architectures is a number", edit_config(architectures=5), "no model can be built from it"),
    ("another model's type", edit_config(model_type="gpt2", architectures=None), "no weight for module 'transf"),
    (
        *("code of its own", edit_config(model_type="own", auto_map={"AutoConfig": "own.C"})),
        "needs code that the checkpoint brings (auto_map), and that code can do anything",
    ),
    (
        *("code of another repository", edit_config(model_type="own", auto_map={"AutoConfig": "a/b--own.C"})),
        "pass --trust-remote-code to run it",
    ),
    ("compiled code", edit_config(_attn_implementation="a/b"), "_attn_implementation names compiled code to download"),
    ("compiled code for a part", edit_config(attn_implementation={"x": "a/b"}), "attn_implementation.x names compiled"),
    ("unknown activation", edit_config(hidden_act="__import__('os')"), "config.json: "),
    ("already quantized", edit_config(quantization_config={"quant_method": ["x"]}), "already quantized"),
    ("deep nesting", write_config(b'{"a":' * 100_000), "nested too deeply"),
    ("nesting of 900", write_config(b'{"a":' * 900 + b"1" + b"}" * 900), "nested more than 64 deep"),
    ("a name twice", write_config(b'{"hidden_size":64,"hidden_size":65}'), "'hidden_size' stands there twice"),
    ("5 million lists", write_config(b'{"a":[' + b"[]," * 5_000_000 + b"0]}"), "more than 4000000 values"),
    ("number of 5000 digits", write_config(b'{"a":' + b"9" * 5000 + b"}"), "4300 digits"),
    ("not UTF-8", write_config(b'{"a":"\xff"}'), "not valid JSON ('utf-8' codec can't decode byte 0xff"),
    ("half a surrogate", write_config(b'{"model_type":"\\udfff"}'), "half of a surrogate pair"),
    ("a list", write_config(b"[]"), "expected a JSON object, found list"),
    ("text", write_config(b'"llama"'), "expected a JSON object, found str"),
    ("empty", write_config(b""), "config.json: not valid JSON"),
    ("1 GB", sparse("model/config.json", 10**9), "has 1000.0 MB, at most 67.1 MB are read"),
    ("link that leaves", instead("config.json", link_out), OUT_OF),
    ("link to itself", instead("config.json", loop), "config.json: Too many levels of symbolic links"),
    ("pipe", instead("config.json", fifo), "config.json: cannot be read (not a regular file)"),
    ("folder", instead("config.json", folder), "config.json: cannot be read (Is a directory)"),
    ("endless device", instead("config.json", device), OUT_OF),
):
    add(f"config: {name}", says, damage)

for name, damage, says in (
    ("an adapter", beside("adapter_config.json", b"{}"), "lies beside the model, so that transformers would load"),
    ("a link to a secret", lambda w: (w.model / "notes.txt").symlink_to(w.outside / "secret"), f"notes.txt: {OUT_OF}"),
    ("a link to a secret in a folder",
     lambda w: ((w.model / "a").mkdir(), (w.model / "a/b.txt").symlink_to("../../outside/secret")), OUT_OF),
    ("a tokenizer that leads out", instead("tokenizer.json", link_out), OUT_OF),
    ("a line end in a name", beside("a\nb.txt", b""), "its name holds characters that cannot be printed"),
    (
        *("a line end in a folder's name", lambda w: ((w.model / "a\nb").mkdir(), (w.model / "a\nb/c").touch())),
        "a b/c: its name holds characters",
    ),
    ("a clear screen in a name", beside("a\x1b[2Jb.txt", b""), "a\\x1b[2Jb.txt: its name holds characters"),
    ("a name that is no UTF-8", lambda w: Path(os.fsdecode(os.fsencode(w.model) + b"/\xff")).touch(), "its name holds"),
    ("10001 files", many_files, "holds more than 10000 files beside its weights"),
):  # fmt: skip
    add(f"beside: {name}", says, damage)
add("beside: a file of 8 TB", "GB are free there", sparse("model/big.txt", 8 << 40), EQFT)


# --- the tokenizer and the calibration text -----------------------------------------------------------------------

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


def text(name: str, content: bytes) -> Callable[[World], object]:
    return lambda world: (world.here / name).write_bytes(content)


def at(name: str, make: Callable[[Path, World], object]) -> Callable[[World], object]:
    return lambda world: make(world.here / name, world)


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


# --- recipes ------------------------------------------------------------------------------------------------------

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 30))
WITH_RECIPE = ("--recipe", "recipe.yaml")
for name, content, says in (
    ("Python tag", b"!!python/object/apply:os.system ['touch ran']", "not valid YAML (could not determine a construct"),
    ("Python tag in a value", b"model: !!python/name:os.system", "not valid YAML (could not determine a construct"),
    ("a billion laughs", LAUGHS.encode(), "line 1: 'a0' is an anchor or alias; write the value itself"),
    ("a billion merges", MERGES.encode(), "line 1: 'a0' is an anchor or alias"),
    ("holds itself", b"bits: &a [*a]", "line 1: 'a' is an anchor or alias"),
    ("a key twice", b"bits: 2\nbits: 3\n", "'bits' stands there twice"),
    ("deep nesting", b"bits: " + b"[" * 5_000, "nested too deeply"),
    ("a date", b"revision: 2024-01-02", "revision: input should be a valid string"),
    ("a date that is none", b"revision: 2024-13-45", "not valid YAML (month must be in 1..12)"),
    ("a tag that does not fit", b"act_order: !!bool maybe", "not valid YAML (a value does not fit its tag)"),
    ("keys that are numbers", b"1: 2", "unknown recipe key '1'"),
    ("keys that are lists", b"? [a]\n: 1\n", "not valid YAML (while constructing a mapping"),
    ("two documents", b"bits: 2\n---\nbits: 3\n", "not valid YAML (expected a single document"),
    ("a list", b"- bits", "expected `option: value` lines, found list"),
    ("empty", b"", "expected `option: value` lines, found NoneType"),
    ("not UTF-8", b"model: \xff", "not valid YAML ('utf-8' codec can't decode"),
    ("NUL", b"model: \0", "not valid YAML (unacceptable character #x0000"),
    ("number of 5000 digits", b"rank: " + b"9" * 5000, "not valid YAML (Exceeds the limit (4300 digits)"),
    ("rank of 10^30", b"rank: " + b"1" + b"0" * 30, "rank: input should be less than or equal to 16777216"),
    ("seed of 10^30", b"seed: " + b"1" + b"0" * 30, "seed: input should be less than 9223372036854775808"),
    ("samples of 10^12", b"calibration: random\ncalibration_samples: 1" + b"0" * 12, "calibration_samples: input shou"),
    ("samples of 10^7", b"calibration: random\ncalibration_samples: 10000000", "5120000000 tokens in all, at most"),
    ("lora_alpha of 1e-300", b"lora_alpha: 1.0e-300", "lora_alpha: expected at least 1e-9"),
    ("lora_alpha NaN", b"lora_alpha: .nan", "lora_alpha: input should be a finite number"),
    ("bits true", b"bits: true", "bits: "),
    ("a very long value", b"format: " + b"x" * 200_000, "format: no 'xxxx"),
    ("a value that clears the screen", b'format: "\\e[2J"', "format: no '\\x1b[2J'"),
    ("a very long key", b"x" * 100 + b": 1\n? " + b"y" * 200_000 + b"\n: 1", "unknown recipe key 'xxx"),
    ("trusts code", b"trust_remote_code: true", "so only the command line can give it, as --trust-remote-code"),
    ("shard of 0", b"max_shard_size: 0GB", "max_shard_size: expected a size like 5GB"),
    ("device of a path", b"device: ../../dev/null", "device: expected auto, cpu, cuda or cuda:N"),
    ("expression without end", b"target_modules: '('", "no valid regular expression"),
    ("300 kB", b"# " + b"x" * 300_000, "has 0.3 MB, at most 0.3 MB are read"),
    ("text with a NUL in its name", b'calibration: "a\\0b"', "no such file"),
):  # fmt: skip
    add(f"recipe: {name}", says, text("recipe.yaml", content), (*PLAN, *WITH_RECIPE), (*EQFT, *WITH_RECIPE))
for name, make, says in (
    ("pipe", fifo, "recipe.yaml: cannot be read (not a regular file)"),
    ("folder", folder, "recipe.yaml: cannot be read (Is a directory)"),
    ("link to itself", loop, "recipe.yaml: cannot be read (Too many levels of symbolic links)"),
    ("endless device", device, "recipe.yaml: cannot be read (not a regular file)"),
):
    add(f"recipe: {name}", says, at("recipe.yaml", make), (*PLAN, *WITH_RECIPE), (*EQFT, *WITH_RECIPE))
for name, model, says in (
    ("NUL", '"a\\0b"', "no such directory, and no Hub id"),
    ("device", "/dev/zero", "no such directory, and no Hub id"),
    ("escape", '"\\e]0;owned\\a"', "\\x1b]0;owned\\x07: no such directory"),
    ("10000 characters", "x" * 10_000, "cannot be looked at (File name too long)"),
    ("traversal", "../../x", "no such directory, and no Hub id"),
):
    add(
        *(f"model: {name}", says, text("recipe.yaml", f"model: {model}".encode())),
        *(("plan", *WITH_RECIPE), ("eqft", *WITH_RECIPE, "--out", "out")),
    )
add("model: revision that leaves", "no branch, tag or commit is named so", text("x", b""),
    ("plan", "someone/model", "--revision", "../../../x"),
    ("eqft", "someone/model", "--revision", "../../../x", "--out", "out"))  # fmt: skip


# --- sensitivity files and reports --------------------------------------------------------------------------------


def sensitivity(content: bytes) -> Callable[[World], object]:
    return text("s.json", content)


def measured(layers: bytes) -> Callable[[World], object]:
    return sensitivity(b'{"signature":{},"how":"x","layers":' + layers + b"}")


NONE_OF_QINIT = "s.json is no sensitivity.json of qinit"
MEQFT = ("meqft", "{model}", "--out", "out", "--ratio", "0.5", "--sensitivity", "s.json")
for name, damage, says in (
    ("no JSON", sensitivity(b"{"), NONE_OF_QINIT),
    ("a list", sensitivity(b"[]"), NONE_OF_QINIT),
    ("nothing in it", sensitivity(b"{}"), NONE_OF_QINIT),
    ("deep nesting", sensitivity(b"[" * 100_000), "nested too deeply"),
    ("NaN", measured(b'{"a":{"2x4":NaN}}'), "nan is no number of nats"),
    ("minus one", measured(b'{"a":{"2x4":-1}}'), "-1 is no number of nats"),
    ("400 digits", measured(b'{"a":{"2x4":1' + b"0" * 400 + b"}}"), "OverflowError"),
    ("true", measured(b'{"a":{"2x4":true}}'), "True is no number of nats"),
    ("no width", measured(b'{"a":{"x":1}}'), NONE_OF_QINIT),
    ("signature as pairs", sensitivity(b'{"signature":[[1,2]],"how":"x","layers":{}}'), NONE_OF_QINIT),
    ("layers as a list", measured(b"[1]"), NONE_OF_QINIT),
    ("a layer twice", measured(b'{"a":{},"a":{}}'), "'a' stands there twice"),
    ("of another model", measured(b"{}"), "was measured for another model (None, now"),
    ("5 million values", measured(b"[" + b"1," * 5_000_000 + b"1]"), "more than 4000000 values"),
    ("1 GB", sparse("s.json", 10**9), "s.json cannot be read (has 1000.0 MB, at most 67.1 MB are read)"),
    ("pipe", at("s.json", fifo), "s.json cannot be read (not a regular file)"),
    ("endless device", at("s.json", device), "s.json cannot be read (not a regular file)"),
    ("folder", at("s.json", folder), "s.json cannot be read (Is a directory)"),
):
    add(f"sensitivity: {name}", says, damage, ("plan", *MEQFT[1:]), MEQFT)


def report(content: bytes) -> Callable[[World], object]:
    return text("qinit.json", content)


def rows(*changes: dict[str, Any], **totals: Any) -> Callable[[World], object]:
    """A good report but for these changes to its rows, and these totals."""
    good = LayerRow("model.layers.0.q_proj", (8, 16), 2, 64, 4, 9, 9, 0.5, 0.25, (), 0.1)
    values = json.loads(Report("m", "c", {"method": "eqft"}, {}, {}, totals, (), (good,)).to_json())
    values["layers"] = [{**values["layers"][0], **change} for change in changes or ({},)]
    return report(json.dumps(values).encode())


FRONT = {"allocation": "sensitivity", "metric": "x", "chosen": [2.5, 1.0]}
NO_REPORT = "not a report of qinit"
for name, damage, says in (
    ("no JSON", report(b"{"), "qinit.json: not JSON"),
    ("a list", report(b"[]"), NO_REPORT),
    ("deep nesting", report(b"[" * 100_000), "qinit.json: not JSON"),
    ("not UTF-8", report(b'"\xff"'), "qinit.json: not JSON"),
    ("no layers", report(b"{}"), NO_REPORT),
    ("error of NaN", rows({"error": float("nan")}), f"{NO_REPORT} (layers.0.error: "),
    ("error of 1e300", rows({"error": 1e300}), f"{NO_REPORT} (layers.0.error: "),
    ("error below 0", rows({"error": -1.0}), f"{NO_REPORT} (layers.0.error: "),
    ("shape of 0", rows({"shape": [0, 0]}), f"{NO_REPORT} (layers.0.shape.0: "),
    ("shape of 10^400", rows({"shape": [10**400, 1]}), NO_REPORT),
    ("bits of 0", rows({"bits": 0}), f"{NO_REPORT} (layers.0.bits: "),
    ("bits of 10^9", rows({"bits": 10**9}), f"{NO_REPORT} (layers.0.bits: "),
    ("a number as name", rows({"name": 5}), f"{NO_REPORT} (layers.0.name: "),
    ("bits per weight as text", rows(bits_per_weight="2"), "totals.bits_per_weight is '2'"),
    ("bits per weight of 10^400", rows(bits_per_weight=10**400), "totals.bits_per_weight is 1000"),
    ("allocation is a list", rows(allocation=[1]), "totals.allocation of the report is not what qinit writes"),
    ("front of NaN", rows(allocation={**FRONT, "front": [[2, float("nan")]]}), "totals.allocation of the report"),
    ("front of 10^400", rows(allocation={**FRONT, "front": [[2, 10**400]]}), "totals.allocation of the report"),
    ("evaluations without text", rows(evaluations=[{}]), "totals.evaluations of the report is not what qinit writes"),
    ("perplexity of -1", rows(evaluations=[{"text": "t", "perplexity": -1, "reference_perplexity": 2}]), "evaluations"),
    ("400 x 400 cells", rows(*({"name": f"l.{n}.k{n}"} for n in range(400))), "400 module types and 400 layer numbers"),
    ("1 GB", sparse("qinit.json", 10**9), "has 1000.0 MB, at most 67.1 MB are read"),
    ("pipe", at("qinit.json", fifo), "qinit.json: cannot be read (not a regular file)"),
    ("endless device", at("qinit.json", device), "qinit.json: cannot be read (not a regular file)"),
    ("link to itself", at("qinit.json", loop), "qinit.json: cannot be read (Too many levels of symbolic links)"),
):
    add(f"report: {name}", says, damage, ("report", ".", "--out", "drawn"))


# --- what a Hub answers ---------------------------------------------------------------------------------------------


def listed(name: str) -> Callable[[str, Any], Any]:
    """The Hub's list of files has one more of this name, as soon as there is a list."""

    def change(path: str, reply: Any) -> Any:
        if isinstance(reply, dict):
            return {**reply, "siblings": [*reply["siblings"], {"rfilename": name}]}
        return [*reply, {"type": "file", "path": name, "size": 2, "oid": "0" * 40}]

    return change


CANNOT_BE_USED = "a/b: the Hub's answer cannot be used"
# name: (what becomes of each JSON reply, what the error says)
HUB_CASES: dict[str, tuple[Callable[[str, Any], Any], str]] = {
    "a file that leaves": (listed("../../evil.json"), CANNOT_BE_USED),
    "a file that leaves from below": (listed("a/../../../evil.json"), CANNOT_BE_USED),
    "a file that leaves by backslashes": (listed("..\\evil.json"), CANNOT_BE_USED),
    "a file named ..": (listed(".."), CANNOT_BE_USED),
    "a reply that is a list": (lambda path, reply: [], CANNOT_BE_USED),
    "a reply that is null": (lambda path, reply: None, CANNOT_BE_USED),
    "a list of files that is a number": (lambda path, reply: {**reply, "siblings": 5}, CANNOT_BE_USED),
}


# --- where the result goes ----------------------------------------------------------------------------------------

for name, out, damage, says in (
    ("in the source", "../model/out", lambda w: None, "is, holds or lies in the source"),
    ("the source", "../model", lambda w: None, "is, holds or lies in the source"),
    ("a link to the source", "link", at("link", lambda path, w: path.symlink_to("../model")), "is, holds or lies in"),
    ("somebody's files", "../outside", lambda w: None, "has no qinit.json, so qinit did not write it"),
    ("a file", "file", text("file", b""), "exists and is no directory"),
    ("a pipe", "pipe", at("pipe", fifo), "exists and is no directory"),
    ("below a file", "file/out", text("file", b""), "file/out: cannot be "),
    ("a link to itself", "loop", at("loop", loop), "loop: cannot be "),
):
    add(f"out: {name}", says, damage, ("eqft", "{model}", "--overwrite", "--out", out))
