"""`qinit verify` as a user runs it."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from qinit.files.manifest import MANIFEST_NAME, listed, write_manifest
from qinit.trial import tried as trial
from qinit.verification.findings import Checked, Finding
from qinit.verification.loading import check_loading
from tests.helpers import edit_json, edit_tensors, quantize
from tests.mixed import gptq_only
from tests.models import make_checkpoint

CONFIG = "eqft_init/adapter_config.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("made")
    source = make_checkpoint(place / "source")
    quantize(source, place / "run", group_size=32)
    return source, place / "run"


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made[1], tmp_path / "run")


def test_a_sound_run_is_said_to_be_sound_and_by_what(command, made, monkeypatch, capsys):
    gptq_only()
    capsys.readouterr()  # what gptqmodel says when it is imported here
    monkeypatch.setattr("qinit.verification.loading.check_loading", check_loading)
    monkeypatch.setattr("qinit.verification.loading.answers", trial.tried)  # in no process of its own
    source, run = made
    code, out, err = command("verify", run, "--source", source)
    assert (code, err) == (0, "")
    count = len(listed(run))
    looked = f"{count} files by their hashes, 91 tensors by their values, 14 layers by their errors against {source}"
    first, second = out.splitlines()
    assert first == f"{run}: sound ({looked})"
    assert second.startswith("loaded by LlamaForCausalLM and PEFT, ")
    assert second.endswith(" from Q + s B A of the files, gradients at 14 adapted modules")


def test_quiet_says_nothing(command, made, run):
    assert command("verify", made[1], "--quiet") == (0, "", "")
    (run / "README.md").unlink()
    assert command("verify", run, "--quiet") == (3, "", "")


def test_a_flipped_bit_in_any_file_is_3_and_a_line_that_names_the_file(command, run):
    rng = random.Random(0)
    for name in [*listed(run), MANIFEST_NAME]:
        sound = (run / name).read_bytes()
        damaged = bytearray(sound)
        damaged[rng.randrange(len(sound))] ^= 1 << rng.randrange(8)
        (run / name).write_bytes(damaged)
        code, out, err = command("verify", run)
        assert (code, err) == (3, ""), name
        first = out.splitlines()[0]
        what = "damaged" if name == MANIFEST_NAME else "has changed since it was written: SHA-256: expected "
        assert first.startswith(f"{name}: {what}"), first
        assert " problem" in out.splitlines()[-1]
        (run / name).write_bytes(sound)
    assert command("verify", run)[0] == 0


def test_json_has_every_finding_with_file_expected_and_found(command, made, run):
    edit_json(run / "config.json", lambda config: config["quantization_config"].update(bits=3))
    edit_tensors(run / "model.safetensors", lambda tensors: tensors["model.norm.weight"].mul_(2))
    write_manifest(run)
    (run / "stray.txt").write_text("x")
    code, out, err = command("verify", run, "--source", made[0], "--json")
    assert (code, err) == (3, "")
    value = json.loads(out)
    assert (value["directory"], value["sound"], value["fixed"]) == (str(run), False, False)
    assert value["checked"] == {"files": len(listed(run)) - 1, "tensors": 91, "layers": 14}
    assert value["problems"] == [
        {"file": "config.json", "what": "quantization_config.bits", "expected": 2, "found": 3},
        {
            **{"file": "model.safetensors", "what": "tensor 'model.norm.weight' is not the source's"},
            **{"expected": None, "found": None},
        },
    ]
    assert [note["file"] for note in value["notes"]] == ["stray.txt", CONFIG]


def test_a_moved_run_is_sound_and_fix_makes_its_adapter_name_the_base(command, run, tmp_path):
    place = run.rename(tmp_path / "place")
    code, out, _ = command("verify", place)
    assert code == 0
    assert f"`qinit verify {place} --fix` makes the adapter name its base where it is now" in out
    code, out, _ = command("verify", place, "--fix")
    assert code == 0
    assert f"fixed: the adapter names {place} as its base" in out
    assert json.loads((place / CONFIG).read_text())["base_model_name_or_path"] == str(place)
    code, out, _ = command("verify", place, "--fix", "--json")
    assert (code, json.loads(out)["notes"], json.loads(out)["fixed"]) == (0, [], False)


def test_fix_leaves_a_damaged_run_alone(command, run):
    edit_json(run / CONFIG, lambda config: config.update(r=9))
    before = (run / CONFIG).read_bytes()
    code, out, _ = command("verify", run, "--fix")
    assert code == 3
    assert f"{CONFIG}: r: expected 4, found 9" in out
    assert "run it once the rest is in order" in out
    assert (run / CONFIG).read_bytes() == before


def test_many_findings_are_shown_in_part(command, run, tmp_path, monkeypatch):
    monkeypatch.setattr("qinit_cli.verify.SHOWN", 5)
    other = make_checkpoint(tmp_path / "other", seed=3)
    code, out, _ = command("verify", run, "--source", other)
    assert code == 3
    lines = out.splitlines()
    assert sum("is not the source's" in line or "against the source" in line for line in lines[:5]) == 4  # and a note
    assert lines[5].startswith("... and ")


@pytest.mark.parametrize("arguments", [("gone",), (".",), ("RUN", "--source", "./gone")])
def test_what_is_no_run_and_what_is_no_source_is_bad_input(command, run, arguments):
    code, out, err = command("verify", *(run if word == "RUN" else word for word in arguments))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("error: ")


@pytest.fixture
def tried(monkeypatch):
    """What `qinit verify` asks to be loaded, and finds: a problem."""
    found = []

    def check_loading(*arguments, **options):
        found.append((*arguments, options))
        yield Finding("config.json", "LlamaForCausalLM passes over x")
        yield Checked("loaded", "loaded by LlamaForCausalLM", 0)

    monkeypatch.setattr("qinit.verification.loading.check_loading", check_loading)
    return found


def test_what_loading_finds_is_3_and_in_the_json(command, made, tried):
    source, run = made
    code, out, _ = command("verify", run, "--source", source, "--deep", "--json")
    value = json.loads(out)
    assert (code, value["sound"], value["loaded"]) == (3, False, "loaded by LlamaForCausalLM")
    assert [problem["what"] for problem in value["problems"]] == ["LlamaForCausalLM passes over x"]
    assert tried == [(run, None, source, {"deep": True, "trust_remote_code": False})]


def test_a_damaged_run_is_not_loaded(command, run, tried):
    (run / "README.md").unlink()
    assert command("verify", run)[0] == 3
    assert tried == []


def test_a_trained_adapter_is_checked_and_loaded_if_it_fits(command, made, run, tried, tmp_path):
    trained = Path(shutil.copytree(run / "eqft_init", tmp_path / "trained"))
    code, out, _ = command("verify", run, "--adapter", trained)
    assert (code, tried[0][1]) == (3, trained)  # for what loading finds
    assert f"{trained}" not in out
    tried.clear()
    edit_tensors(trained / "adapter_model.safetensors", lambda tensors: tensors.popitem())
    code, out, _ = command("verify", run, "--adapter", trained)
    assert (code, tried) == (3, [])
    assert f"\n{trained / 'adapter_model.safetensors'}: model.layers." in out
    code, _, err = command("verify", run, "--adapter", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "adapter_config.json: not found; an adapter's directory has one, as trained below it has" in err


def test_code_that_lies_in_the_run_is_run_where_that_is_asked_for(command, own_code, tmp_path):
    quantize(own_code, tmp_path / "own-run", format="dense", trust_remote_code=True)
    code, out, _ = command("verify", tmp_path / "own-run")
    assert code == 3
    assert "read it, then pass --trust-remote-code to run it" in out
    assert command("verify", tmp_path / "own-run", "--trust-remote-code", "--source", own_code)[0] == 0


def test_a_source_on_the_hub_is_read_at_the_run_s_revision(command, made, run, hub):
    source, _ = made
    hub.repos["owner/tiny"] = source
    edit_json(run / "qinit.json", lambda report: report["source"].update(model="owner/tiny", revision="main"))
    write_manifest(run)
    code, out, err = command("verify", run, "--source", "owner/tiny")
    assert (code, err) == (0, "")
    assert "14 layers by their errors against owner/tiny" in out
    assert any("/revision/main" in path for path, _ in hub.requests)
    code, _, err = command("verify", run, "--source", "owner/tiny", "--revision", "gone")
    assert code == 2
    assert "the Hub has no revision 'gone'" in err


def test_for_a_server_reads_configurations_alone_and_says_what_to_do(command, finished):
    code, out, err = command("verify", finished, "--for", "vllm")
    assert (code, out, err) == (0, f"{finished} for vllm: nothing against it (configurations alone were read)\n", "")
    code, out, _ = command("verify", finished, "--for", "llama.cpp", "--json")
    value = json.loads(out)
    assert (code, value["server"], value["sound"], len(value["problems"])) == (3, "llama.cpp", False, 2)
    code, _, err = command("verify", finished, "--for", "vlm")
    assert (code, "--for: no 'vlm' (did you mean 'vllm'?)" in err) == (2, True)
