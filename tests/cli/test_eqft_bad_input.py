import errno
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import safetensors.torch
import torch

from qinit.files.tensors import INDEX_NAME
from qinit.files.writer import SafetensorsWriter
from tests.helpers import edit_config, rewrite_header
from tests.models import make_checkpoint

QUICK = ("--rank", 4, "--iter", 1)

# Bad input: what is done to a good checkpoint, the options, and what the one line on stderr says.


def edit_weight(name, change):
    def edit(source):
        file = source / "model.safetensors"
        tensors = safetensors.torch.load_file(file)
        change(tensors[name])
        safetensors.torch.save_file(tensors, file)

    return edit


def edit_header(change):
    return lambda source: rewrite_header(source / "model.safetensors", change)


def config(**changes):
    return lambda source: edit_config(source, **changes)


def sharded(**weight_map):
    """Turn the checkpoint into shards whose index places `norm` where `weight_map` says."""

    def edit(source):
        shutil.rmtree(source)
        make_checkpoint(source, max_shard_size="50KB")
        index = json.loads((source / INDEX_NAME).read_text())
        index["weight_map"].update({f"model.{name}.weight": file for name, file in weight_map.items()})
        (source / INDEX_NAME).write_text(json.dumps(index))

    return edit


def remove_shard(source):
    sharded()(source)
    sorted(source.glob("model-*.safetensors"))[0].unlink()


def cut(source):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def huge_length(source):
    file = source / "model.safetensors"
    file.write_bytes(b"\xff" * 7 + b"\x00" + file.read_bytes()[8:])


def bad_json(source):
    file = source / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:8] + b"[" + raw[9:])


def duplicate_name(source):
    file = source / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].rstrip()
    norm = json.dumps(json.loads(header)["model.norm.weight"])
    header = header[:-1] + f',"model.norm.weight":{norm}}}'.encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


def pickled(source):
    (source / "model.safetensors").rename(source / "pytorch_model.bin")


def shift(name, by):
    def change(header):
        header[name]["data_offsets"] = [offset + by for offset in header[name]["data_offsets"]]

    return edit_header(change)


def recipe(text):
    return lambda source: Path("recipe.yaml").write_text(text)


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
NAN, INF = float("nan"), float("inf")
BAD_INPUT = {
    "no weights": (lambda s: (s / "model.safetensors").unlink(), [], "neither model.safetensors nor model.safetensors"),
    "no config": (lambda s: (s / "config.json").unlink(), [], "config.json: not found; a model directory has one"),
    "broken config": (lambda s: (s / "config.json").write_text("{"), [], "config.json: not valid JSON"),
    "config is a list": (lambda s: (s / "config.json").write_text("[]"), [], "expected a JSON object, found list"),
    "pickle only": (pickled, [], "only pickle weights (pytorch_model.bin), which can run code when read; convert"),
    "missing shard": (remove_shard, [], "-of-00005.safetensors: missing, but model.safetensors.index.json places"),
    "index leaves by ..": (sharded(norm="../x.safetensors"), [], "placed in '../x.safetensors', which is no plain"),
    "index leaves by root": (sharded(norm="/etc/passwd"), [], "'model.norm.weight' is placed in '/etc/passwd'"),
    "index names a number": (sharded(norm=3), [], "is placed in 3, which is no plain file name"),
    "truncated": (cut, [], "truncated or damaged, download or copy it again"),
    "huge header": (huge_length, [], "not a whole safetensors file (header of"),
    "header is no JSON": (bad_json, [], "corrupt safetensors header"),
    "overlap": (shift(NORM, -8), [], "overlaps another or leaves a gap"),
    "negative offset": (shift(NORM, -(1 << 30)), [], f"tensor '{NORM}' has a shape or offset that is no count"),
    "duplicate name": (duplicate_name, [], f"'{NORM}' stands there twice"),
    "size mismatch": (edit_header(lambda h: h[NORM].update(shape=[65])), [], "of shape [65] takes 130 bytes, not 128"),
    "NaN in a target": (edit_weight(UP, lambda w: w[:2, 3].fill_(NAN)), [], f"'{UP}' holds 2 NaN or Inf among 8192"),
    "Inf in a copied weight": (edit_weight(NORM, lambda w: w[5:8].fill_(INF)), [], f"'{NORM}' holds 3 NaN or Inf"),
    "bits": (None, ["--bits", 5], "bits: method eqft offers 2, 3, 4 or 8, found 5"),
    "rank": (None, ["--rank", 0], "rank: input should be greater than or equal to 1, found 0"),
    "group size": (None, ["--group-size", 48], "needs a group size of 16, 32, 64"),
    "group size for dense": (None, ["--group-size", 0, "--format", "dense"], "group_size: input should be greater"),
    "iter": (None, ["--iter", 0], "iter: input should be greater"),
    "alpha": (None, ["--lora-alpha", "inf"], "lora_alpha: input should be a finite number"),
    "format": (None, ["--format", "gtpq"], "format: no 'gtpq' (did you mean 'gptq'?)"),
    "shard size": (None, ["--max-shard-size", "big"], "max_shard_size: expected a size like 5GB"),
    "no layer": (
        None,
        ["--target-modules", "q_prj"],
        "named 'q_prj' (did you mean 'q_proj'?); the model has q_proj (2x)",
    ),
    "no layer is left": (None, ["--exclude", ".*"], "no linear module is left to quantize; the model has"),
    "bad expression": (None, ["--target-modules", "("], "no valid regular expression"),
    "already quantized": (
        *(config(quantization_config={"quant_method": "gptq", "bits": 4}), []),
        "already quantized (quant_method gptq)",
    ),
    "unknown model_type": (config(model_type="nosuch"), [], "does not know this model (model_type 'nosuch')"),
    "config of another model": (config(intermediate_size=256), [], "config and weights belong to different models"),
    "too few layers": (config(num_hidden_layers=5), [], "no weight for module 'model.layers.2.self_attn.q_proj'"),
    "unknown recipe key": (
        *(recipe("bit: 3\n"), ["--recipe", "recipe.yaml"]),
        "recipe.yaml: unknown recipe key 'bit' (did you mean 'bits'?)",
    ),
    "broken YAML": (recipe("bits: [3\n"), ["--recipe", "recipe.yaml"], "recipe.yaml: not valid YAML"),
    "no recipe": (None, ["--recipe", "gone.yaml"], "gone.yaml: cannot be read"),
    "value in a recipe": (recipe("seed: many\n"), ["--recipe", "recipe.yaml"], "seed: input should be a valid integer"),
    "no CUDA": (None, ["--device", "cuda"], "no 'cuda' here, torch sees 0 CUDA devices; use --device cpu or auto"),
    "unknown device": (None, ["--device", "gpu"], "device: expected auto, cpu, cuda or cuda:N, found 'gpu'"),
}


def assert_refused(result, message, out="out"):
    code, stdout, stderr = result
    lines = stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines
    assert len(lines) == 1
    assert message in stderr
    assert code == 2
    assert "Load it" not in stdout
    assert not list(Path().glob(f"*{out}*"))
    assert not list(Path().glob(f".*{out}*"))


@pytest.mark.parametrize(("damage", "options", "message"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_one_line_that_says_what_is_wrong(command, tiny_llama, monkeypatch, damage, options, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if damage:
        damage(tiny_llama)
    assert_refused(command("eqft", tiny_llama, *QUICK, "--out", "out", *options), message)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./gone", "./gone: no such directory, and no Hub id"),
        ("/gone/model", "/gone/model: no such directory"),
        ("a/b/c", "a/b/c: no such directory, and no Hub id"),
        ("someone/unknown", "someone/unknown: no such directory here and no such model on the Hub"),
    ],
)
def test_a_model_that_is_nowhere(command, hub, model, message):
    assert_refused(command("eqft", model, "--out", "out"), message)


def test_a_revision_that_is_not_there(command, hub, tiny_llama):
    hub.repos["someone/tiny"] = tiny_llama
    result = command("eqft", "someone/tiny", "--revision", "v9", "--out", "out")
    assert_refused(result, "someone/tiny: the Hub has no revision 'v9' of it")


def test_a_hub_that_is_not_there(command, hub):
    hub.close()
    assert_refused(command("eqft", "someone/tiny", "--out", "out"), "the Hub cannot be reached")


def test_an_output_inside_the_source(command, tiny_llama):
    result = command("eqft", tiny_llama, *QUICK, "--out", tiny_llama / "out")
    assert_refused(result, f"out: is, holds or lies in the source {tiny_llama}")
    assert not (tiny_llama / "out").exists()


def test_an_output_that_qinit_did_not_write(command, tiny_llama):
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("x")
    result = command("eqft", tiny_llama, *QUICK, "--out", "mine", "--overwrite")
    assert_refused(result, "mine: exists and has no qinit.json, so qinit did not write it")
    assert Path("mine/notes.txt").read_text() == "x"


def test_a_disk_that_is_too_small(command, tiny_llama, monkeypatch):
    usage = namedtuple("usage", "total used free")(1000, 0, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert_refused(command("eqft", tiny_llama, *QUICK, "--out", "out"), "out: needs ")


def test_a_disk_that_fills_up(command, tiny_llama, monkeypatch):
    real, calls = SafetensorsWriter.write_chunks, iter(range(100))

    def write(self, *arguments):
        if next(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, *arguments)

    monkeypatch.setattr(SafetensorsWriter, "write_chunks", write)
    result = command("eqft", tiny_llama, *QUICK, "--out", "out")
    assert_refused(result, "out: cannot be written (No space left on device); nothing was left there")
