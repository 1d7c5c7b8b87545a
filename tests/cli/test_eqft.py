import errno
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from qinit_cli.eqft import _command

from qinit import demo
from qinit.safetensors_io import INDEX_NAME, SafetensorsWriter, StoredTensor
from tests.conftest import make_checkpoint, weights_of

QUICK = ("--rank", 4, "--iter", 1)
# What a recipe says of calibration when there is none.
UNCALIBRATED = {
    **{"calibration": "none", "text_field": None, "calibration_samples": 128, "calibration_length": 512},
    **{"calibration_mode": "sequential", "rounding": None, "act_order": False, "polish": 0},
    **dict.fromkeys(("ratio", "bits_low", "bits_high", "target_bits", "bits_choices", "sensitivity", "rank_budget")),
    **{"allocation": "sensitivity", "tie": "none"},
}


def run_directory(name):
    return Path("model_zoo/eqft") / name


def texts_below(directory):
    """Return all that a run wrote except tensors."""
    files = [file for file in directory.rglob("*") if file.suffix in (".json", ".md")]
    assert len(files) == 5
    return "".join(file.read_text() for file in files)


class TestRun:
    def test_the_directory_is_named_after_model_bits_and_rank(self, command, tiny_llama):
        code, _, err = command("eqft", tiny_llama, *QUICK, "--bits", 3)
        assert (code, err) == (0, "")
        assert [path.name for path in Path("model_zoo/eqft").iterdir()] == ["tiny-llama-3bit-4rank"]
        code, _, _ = command("eqft", tiny_llama, *QUICK, "--save-dir", "runs")
        assert code == 0
        assert Path("runs/tiny-llama-2bit-4rank/qinit.json").is_file()

    def test_a_model_given_as_dot_has_the_directorys_name(self, command, tiny_llama, monkeypatch, tmp_path):
        monkeypatch.chdir(tiny_llama)
        assert command("eqft", ".", *QUICK, "--save-dir", tmp_path / "runs")[0] == 0
        assert (tmp_path / "runs/tiny-llama-2bit-4rank").is_dir()

    def test_out_is_the_directory_itself(self, command, tiny_llama):
        assert command("eqft", tiny_llama, *QUICK, "--out", "here", "--save-dir", "there")[0] == 0
        assert Path("here/qinit.json").is_file()
        assert not Path("there").exists()

    def test_every_option_reaches_the_recipe(self, command, tiny_llama):
        options = {
            **{"bits": 4, "rank": 8, "iter": 2, "group_size": 32, "format": "dense", "lora_alpha": 12.0, "seed": 7},
            **{"target_modules": "q_proj,v_proj", "exclude": ".*layers.1.*", "max_shard_size": "1MB"},
            **{"device": "cpu", "use_rslora": True},
        }
        flags = []
        for name, value in options.items():
            flags += [f"--{name.replace('_', '-')}"] + ([] if value is True else [value])
        assert command("eqft", tiny_llama, *flags, "--out", "out")[0] == 0
        recipe = json.loads(Path("out/qinit.json").read_text())["recipe"]
        unasked = {"method": "eqft", "revision": None, "trust_remote_code": False, **UNCALIBRATED}
        assert recipe == {"model": str(tiny_llama), **unasked, **options}
        assert len(json.loads(Path("out/qinit.json").read_text())["layers"]) == 2

    def test_a_recipe_file_does_what_the_flags_do(self, command, tiny_llama):
        recipe = {"model": str(tiny_llama), "bits": 3, "rank": 4, "iter": 1, "use_rslora": True}
        Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
        assert command("eqft", "--recipe", "recipe.yaml", "--out", "one")[0] == 0
        assert command("eqft", tiny_llama, *QUICK, "--bits", 3, "--use-rslora", "--out", "two")[0] == 0
        assert weights_of(Path("one")) == weights_of(Path("two"))

    def test_flags_win_over_the_recipe_file(self, command, tiny_llama):
        Path("recipe.yaml").write_text("model: ./gone\nbits: 3\nuse_rslora: true\nrank: 4\niter: 1\n")
        code, _, _ = command(
            "eqft", tiny_llama, "--recipe", "recipe.yaml", "--bits", 4, "--no-use-rslora", "--out", "out"
        )
        assert code == 0
        recipe = json.loads(Path("out/qinit.json").read_text())["recipe"]
        assert (recipe["bits"], recipe["use_rslora"], recipe["rank"]) == (4, False, 4)

    def test_the_recipe_in_qinit_json_reproduces_the_run(self, command, tiny_llama):
        assert command("eqft", tiny_llama, *QUICK, "--lora-alpha", 9, "--seed", 3, "--out", "one")[0] == 0
        Path("again.yaml").write_text(yaml.safe_dump(json.loads(Path("one/qinit.json").read_text())["recipe"]))
        assert command("eqft", "--recipe", "again.yaml", "--out", "two")[0] == 0
        assert weights_of(Path("one")) == weights_of(Path("two"))

    def test_overwrite_replaces_an_earlier_run(self, command, tiny_llama):
        command("eqft", tiny_llama, *QUICK, "--out", "out")
        code, out, err = command("eqft", tiny_llama, *QUICK, "--bits", 3, "--out", "out")
        assert (code, out) == (2, "")
        assert err == "error: out: exists; pass --overwrite to replace it, or choose another place with --out\n"
        assert command("eqft", tiny_llama, *QUICK, "--bits", 3, "--out", "out", "--overwrite")[0] == 0
        assert json.loads(Path("out/qinit.json").read_text())["recipe"]["bits"] == 3

    def test_json_is_all_that_stdout_gets(self, command, tiny_llama):
        code, out, err = command("eqft", tiny_llama, *QUICK, "--json")
        value = json.loads(out)
        assert code == 0
        assert Path(value["directory"]) == run_directory("tiny-llama-2bit-4rank").resolve()
        assert value["totals"]["layers"] == len(value["layers"]) == 14
        assert "Load it:" in err

    def test_json_and_quiet_leave_stderr_empty(self, command, tiny_llama):
        code, out, err = command("eqft", tiny_llama, *QUICK, "--json", "--quiet")
        assert (code, err) == (0, "")
        assert json.loads(out)["totals"]["layers"] == 14

    def test_quiet_writes_nothing(self, command, tiny_llama):
        assert command("eqft", tiny_llama, *QUICK, "--quiet") == (0, "", "")

    @pytest.mark.parametrize("json_flag", [[], ["--json"]])
    def test_a_dry_run_writes_nothing_and_reads_no_weights(self, command, tiny_llama, monkeypatch, json_flag):
        def refuse(*_):
            raise AssertionError("a weight was read")

        monkeypatch.setattr(StoredTensor, "read", refuse)
        monkeypatch.setattr(StoredTensor, "chunks", refuse)
        code, out, err = command("eqft", tiny_llama, "--dry-run", *json_flag)
        assert code == 0
        assert list(Path().iterdir()) == []
        if json_flag:
            plan = json.loads(out)
            assert len(plan["layers"]) == 14
            assert plan["recipe"]["rank"] == 16
            assert "plan for" in err
        else:
            assert "would be written to" in out
            assert err == ""

    def test_a_rank_above_a_matrix_is_lowered_and_said(self, command, tiny_llama):
        code, out, _ = command("eqft", tiny_llama, "--rank", 48, "--iter", 1, "--out", "out")
        assert code == 0
        assert "note: model.layers.0.self_attn.k_proj: rank lowered from 48 to 32" in out
        assert "rank lowered from 48 to 32" in Path("out/README.md").read_text()


class TestDemo:
    @pytest.fixture
    def stand_in(self, tiny_llama, monkeypatch):
        monkeypatch.setattr(demo, "demo_directory", lambda: tiny_llama)

    def test_without_a_model_the_first_line_names_the_demo_model(self, command, stand_in):
        code, out, _ = command("eqft", *QUICK)
        assert code == 0
        assert out.splitlines()[0] == f"No MODEL given: using {demo.DEMO_TITLE}."
        assert run_directory("demo-2bit-4rank").is_dir()

    def test_with_json_that_line_goes_to_stderr(self, command, stand_in):
        _, out, err = command("eqft", *QUICK, "--json")
        assert err.splitlines()[0].startswith("No MODEL given")
        assert json.loads(out)["model"] == "demo"

    def test_a_recipe_without_a_model_reproduces_the_demo_run(self, command, stand_in):
        command("eqft", *QUICK, "--out", "one")
        Path("again.yaml").write_text(yaml.safe_dump(json.loads(Path("one/qinit.json").read_text())["recipe"]))
        assert command("eqft", "--recipe", "again.yaml", "--out", "two")[0] == 0
        assert weights_of(Path("one")) == weights_of(Path("two"))

    def test_the_embedded_model_is_quantized(self, command):
        code, out, err = command("eqft", "--bits", 2, "--rank", 16, "--iter", 1)
        assert (code, err) == (0, "")
        assert out.startswith("No MODEL given: using the embedded demo model")
        report = json.loads((run_directory("demo-2bit-16rank") / "qinit.json").read_text())
        assert report["totals"]["layers_kept"] == 0
        assert 0.1 < report["totals"]["error"] < report["totals"]["error_start"]


class TestHub:
    def test_a_model_from_the_hub_is_downloaded_and_named_after_its_last_part(self, command, hub, tmp_path):
        repo = make_checkpoint(tmp_path / "repo", max_shard_size="50KB")
        (repo / "pytorch_model.bin").write_text("x")
        hub.repos["someone/tiny"] = repo
        hub.revisions.append("v2")
        code, _, _ = command("eqft", "someone/tiny", *QUICK, "--revision", "v2", "--token", "hf_secret")
        assert code == 0
        out = run_directory("tiny-2bit-4rank")
        report = json.loads((out / "qinit.json").read_text())
        assert (report["model"], report["source"]["revision"]) == ("someone/tiny", "v2")
        assert "base_model: someone/tiny\n" in (out / "README.md").read_text()
        assert "pytorch_model.bin" not in hub.fetched()

    @pytest.mark.parametrize("form", [["--token", "hf_secret"], ["--token=hf_secret"]])
    def test_the_token_is_never_written_or_printed(self, command, hub, tmp_path, form):
        hub.repos["someone/tiny"] = make_checkpoint(tmp_path / "repo")
        code, out, err = command("eqft", "someone/tiny", *QUICK, *form, "--json", "--out", "out")
        assert code == 0
        assert {token for _, token in hub.requests} == {"Bearer hf_secret"}
        written = texts_below(Path("out"))
        assert "$HF_TOKEN" in json.loads(Path("out/qinit.json").read_text())["command"]
        assert "hf_secret" not in written + out + err

    @pytest.mark.parametrize("token", ["hf_secret\nhf_other", "hf_secrét"])
    @pytest.mark.parametrize("by_environment", [True, False])
    def test_a_token_that_cannot_be_sent_is_not_printed_either(self, command, hub, monkeypatch, token, by_environment):
        if by_environment:
            monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
        code, out, err = command("eqft", "someone/tiny", *([] if by_environment else ["--token", token]))
        assert (code, out) == (2, "")
        assert err == (
            "error: someone/tiny: the Hub token holds characters that no token has; check HF_TOKEN or --token\n"
        )

    def test_a_line_end_after_the_token_does_no_harm(self, command, hub, tmp_path):
        hub.repos["someone/tiny"] = make_checkpoint(tmp_path / "repo")
        assert command("eqft", "someone/tiny", *QUICK, "--token", "hf_secret\n")[0] == 0
        assert {token for _, token in hub.requests} == {"Bearer hf_secret"}

    def test_the_token_of_the_environment_is_used_and_not_written(self, command, hub, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        hub.repos["someone/tiny"] = make_checkpoint(tmp_path / "repo")
        code, out, err = command("eqft", "someone/tiny", *QUICK, "--out", "out")
        assert code == 0
        assert {token for _, token in hub.requests} == {"Bearer hf_secret"}
        written = texts_below(Path("out"))
        assert "hf_secret" not in written + out + err


def test_the_command_is_quoted_and_without_the_token():
    assert _command(["eqft", "my model", "--token", "2", "--bits", "2"]) == (
        "qinit eqft 'my model' --token $HF_TOKEN --bits 2"
    )
    assert _command(["eqft", "--token=hf_x"]) == "qinit eqft --token=$HF_TOKEN"


# Bad input: what is done to a good checkpoint, the options, and what the one line on stderr says.


def edit_json(file, **changes):
    value = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


def edit_weight(name, change):
    def edit(source):
        file = source / "model.safetensors"
        tensors = safetensors.torch.load_file(file)
        change(tensors[name])
        safetensors.torch.save_file(tensors, file)

    return edit


def edit_header(change):
    """Change the parsed header and write it back over the data, its length fixed."""

    def edit(source):
        file = source / "model.safetensors"
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        change(header)
        new = json.dumps(header).encode()
        file.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + length :])

    return edit


def config(**changes):
    return lambda source: edit_json(source / "config.json", **changes)


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
    "bits": (None, ["--bits", 5], "bits: input should be 2, 3, 4 or 8, found 5"),
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
