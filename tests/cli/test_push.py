import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers import contents
from tests.hub_stand_in import READER, WRITER
from tests.models import make_checkpoint
from tests.stock import load, logits

REPO = "me/tiny"
QUICK = ("--rank", 4, "--iter", 1, "--calibration", "none", "--out", "out")
TOKEN = ("--token", WRITER)
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


class TestPush:
    def test_it_says_where_it_is_and_how_to_load_it(self, command, hub, run):
        code, out, err = command("push", run, REPO, *TOKEN)
        assert (code, err) == (0, "")
        assert out.splitlines() == [
            "to me/tiny: 11 files, " + out.splitlines()[0].split(", ")[1],
            f"pushed to {hub.endpoint}/{REPO}",
            "Load it:",
            "    from transformers import LlamaForCausalLM; from peft import PeftModel",
            '    base = LlamaForCausalLM.from_pretrained("me/tiny", dtype="auto")',
            '    model = PeftModel.from_pretrained(base, "me/tiny", subfolder="eqft_init", is_trainable=True)',
        ]
        assert hub.files(REPO).keys() == {*contents(run), ".gitattributes"}

    def test_json_is_the_only_thing_on_stdout(self, command, hub, run):
        (run / "notes.txt").write_text("x")
        code, out, err = command("push", run, REPO, *TOKEN, "--create-pr", "--json")
        assert (code, out) == (2, "")
        assert err.splitlines()[-1].startswith("error: me/tiny: no such repository on the Hub")
        code, out, err = command("push", run, REPO, *TOKEN, "--json", "--private", "--revision", "v2")
        assert code == 0
        value = json.loads(out)
        assert (value["repo_id"], value["revision"], value["pull_request"]) == (REPO, "v2", None)
        assert value["url"] == f"{hub.endpoint}/{REPO}/tree/v2"
        assert {file["name"]: file["bytes"] for file in value["files"]} == {
            name: len(data) for name, data in hub.files(REPO, "v2").items() if name != ".gitattributes"
        }
        assert value["left_out"] == ["notes.txt"]
        assert value["load"][1] == 'base = LlamaForCausalLM.from_pretrained("me/tiny", revision="v2", dtype="auto")'
        assert "note: not pushed, as the run did not write it: notes.txt\n" in err

    def test_quiet_says_nothing(self, command, hub, run):
        assert command("push", run, REPO, *TOKEN, "--quiet") == (0, "", "")

    def test_a_pull_request_is_named(self, command, hub, run):
        assert command("push", run, REPO, *TOKEN, "--quiet")[0] == 0
        (run / "README.md").write_text("# Mine\n")
        code, out, _ = command("push", run, REPO, *TOKEN, "--create-pr")
        assert code == 0
        assert f"\npull request: {hub.endpoint}/{REPO}/discussions/1\n" in out
        assert '.from_pretrained("me/tiny", revision="refs/pr/1", ' in out

    def test_a_dry_run_contacts_nobody_and_lists_all(self, command, hub, run, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        before = contents(run)
        code, out, err = command("push", run, REPO, "--dry-run")
        assert (code, err) == (0, "")
        assert {line.split()[0] for line in out.splitlines() if line.startswith("  ")} == before.keys()
        anew = {line.split()[0] for line in out.splitlines() if line.endswith("made anew")}
        assert anew == {"README.md", "SHA256SUMS", "eqft_init/adapter_config.json", "qinit.json"}
        base = json.loads(before["eqft_init/adapter_config.json"])["base_model_name_or_path"]
        assert f"eqft_init/adapter_config.json, base_model_name_or_path: {base} -> me/tiny" in out.splitlines()
        assert any(line.startswith("README.md, line 2: base_model: ") for line in out.splitlines())
        assert out.splitlines()[-1] == "would go to branch main of me/tiny; nothing was sent"
        value = json.loads(command("push", run, REPO, "--dry-run", "--json")[1])
        assert value["changes"][0]["after"] == REPO
        assert len(value["files"]) == len(before)
        assert hub.requests == []
        assert contents(run) == before

    def test_what_is_wrong_is_one_line_and_2(self, command, hub, run, tmp_path):
        (tmp_path / "empty").mkdir()
        for arguments, message in (
            ((tmp_path / "gone", REPO, *TOKEN), f"{tmp_path / 'gone'}: no such directory; pass the directory"),
            (
                (tmp_path / "empty", REPO, *TOKEN),
                "qinit.json: no such file; pass the directory that `qinit eqft` wrote",
            ),
            ((run, "tiny", *TOKEN), "tiny: names no owner; give OWNER/NAME"),
            ((run, REPO), "me/tiny: a push needs a Hub token; set HF_TOKEN"),
            ((run, REPO, "--token", READER), "status 403 (this token may only read)"),
            ((run, REPO, *TOKEN, "--create-pr", "--revision", "x"), "--create-pr: opens a pull request to the main"),
        ):
            code, _, err = command("push", *arguments)
            assert code == 2
            assert err.startswith("error: ")
            assert err.count("\n") == 1
            assert message in err
        assert hub.pushed == {}

    def test_an_interrupt_says_how_to_go_on(self, command, hub, run, monkeypatch):
        def interrupt(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", interrupt)
        code, _, err = command("push", run, REPO, *TOKEN)
        assert code == 130
        assert err == (
            f"error: interrupted; the run is complete in {run}, and me/tiny may hold a part of it; "
            f"to go on: qinit push {run} me/tiny\n"
        )


class TestPushToHub:
    def test_the_run_is_pushed_when_it_is_in_its_place(self, command, hub, tiny_llama):
        code, out, err = command("eqft", tiny_llama, *QUICK, "--push-to-hub", REPO, "--private", *TOKEN)
        assert (code, err) == (0, "")
        assert f"\npushed to {hub.endpoint}/{REPO}\n" in out
        assert hub.pushed[REPO].private
        run, there = contents(Path("out")), hub.files(REPO)
        assert there.keys() == {*run, ".gitattributes", "SHA256SUMS"}
        assert all(there[name] == run[name] for name in run if name.endswith(".safetensors"))
        assert json.loads(there["eqft_init/adapter_config.json"])["base_model_name_or_path"] == REPO
        assert json.loads(run["eqft_init/adapter_config.json"])["base_model_name_or_path"] == str(Path("out").resolve())

    def test_mixed_widths_say_that_they_are_fetched_first(self, command, hub, tiny_llama):
        mixed = (
            "--ratio",
            0.5,
            "--bits-high",
            4,
            "--allocation",
            "first",
            "--format",
            "gptq",
            "--push-to-hub",
            REPO,
            *TOKEN,
        )
        code, out, _ = command("meqft", tiny_llama, *QUICK, *mixed, "--json")
        assert code == 0
        assert json.loads(out)["pushed"]["load"] == [
            "import qinit; from huggingface_hub import snapshot_download",
            'model = qinit.load(snapshot_download("me/tiny"), trainable=True)',
        ]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("tiny", *TOKEN), "tiny: names no owner"),
            ((REPO,), "me/tiny: a push needs a Hub token"),
            ((REPO, "--token", "hf_wrong"), "me/tiny: the Hub answered with status 401"),
            ((REPO, "--token", READER), "me/tiny: the Hub answered with status 403"),
            (("else/tiny", *TOKEN), "else/tiny: the Hub answered with status 403"),
        ],
    )
    def test_what_would_fail_at_the_last_step_fails_before_the_first(
        self, command, hub, tiny_llama, arguments, message
    ):
        code, _, err = command("eqft", tiny_llama, *QUICK, "--push-to-hub", *arguments)
        assert code == 2
        assert err.startswith(f"error: {message}")
        assert err.count("\n") == 1
        assert not Path("out").exists()
        assert hub.pushed == {}

    def test_offline_is_told_before_the_run(self, command, hub, tiny_llama, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        code, _, err = command("eqft", tiny_llama, *QUICK, "--push-to-hub", REPO, *TOKEN)
        assert (code, err) == (2, "error: me/tiny: HF_HUB_OFFLINE is set, so nothing can be pushed; unset it\n")
        assert not Path("out").exists()

    def test_a_push_that_fails_leaves_the_run_and_names_the_command_that_pushes_it(
        self, command, hub, tiny_llama, no_waiting
    ):
        hub.fail("commit/main", 503)
        code, out, err = command("eqft", tiny_llama, *QUICK, "--push-to-hub", REPO, "--private", *TOKEN, "--json")
        assert code == 2
        report = json.loads(out)
        assert report["pushed"] is None
        error = err.splitlines()[-1]
        assert error.startswith(
            "error: me/tiny: the Hub answered with status 503; try again later. The run is complete"
        )
        run = contents(Path("out"))
        assert report["layers"] == json.loads(run["qinit.json"])["layers"]
        hub.faults.clear()
        again = shlex.split(error.split("to push it: qinit ")[1])
        assert again == ["push", "out", REPO, "--private"]
        assert command(*again, *TOKEN)[0] == 0
        assert contents(Path("out")) == run
        assert hub.files(REPO).keys() == {*run, ".gitattributes", "SHA256SUMS"}

    def test_an_interrupt_of_the_push_leaves_the_run(self, command, hub, tiny_llama, monkeypatch):
        def interrupt(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", interrupt)
        code, _, err = command("eqft", tiny_llama, *QUICK, "--push-to-hub", REPO, *TOKEN)
        assert code == 130
        assert err.startswith("error: interrupted; the run is complete in out, ")
        assert Path("out/qinit.json").is_file()

    def test_a_dry_run_contacts_nobody(self, command, hub, tiny_llama):
        assert command("eqft", tiny_llama, *QUICK, "--push-to-hub", REPO, "--dry-run")[0] == 0
        assert hub.requests == []

    def test_private_is_about_a_push(self, command, tiny_llama):
        code, _, err = command("eqft", tiny_llama, *QUICK, "--private")
        assert (code, err) == (2, "error: --private: is about --push-to-hub REPO_ID, which is not given\n")


@pytest.fixture
def environment(hub, tmp_path, monkeypatch):
    """What makes the stock loaders take a token, and keep what they fetch, as for a user of the stand-in."""
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "another-cache"))


def test_what_was_pushed_is_loaded_by_the_repo_id_alone(command, run, hub, environment):
    # Not offline: PEFT 0.21 looks for SUBFOLDER/SUBFOLDER/adapter_model.safetensors in the cache then.
    hub.chunk_size = 50_000
    code, out, err = command("push", run, REPO, *TOKEN, "--private", "--json")
    assert code == 0, err
    lines = json.loads(out)["load"]
    assert 'subfolder="eqft_init"' in lines[-1]
    hub.requests.clear()
    names = {}
    exec("\n".join(lines), names)
    adapter = names["model"].peft_config["default"]
    assert adapter.base_model_name_or_path == REPO
    assert sum(parameter.requires_grad for parameter in names["model"].parameters()) == 28
    theirs, ours = logits(names["model"].eval()), logits(load(run, dtype="auto"))
    assert torch.equal(theirs, ours)
    assert ours.std() > 0
    shards = {name for name in hub.files(REPO) if name.startswith("model-")}
    assert {*shards, "config.json", "eqft_init/adapter_model.safetensors"} <= hub.fetched()


def test_a_sharded_model_of_the_hub_at_a_revision_and_then_offline(command, hub, tmp_path, monkeypatch):
    repo = make_checkpoint(tmp_path / "repo", max_shard_size="50KB")
    for name in ("pytorch_model.bin", "onnx/model.onnx", "model-q4.gguf", "model.onnx"):
        (repo / name).parent.mkdir(exist_ok=True)
        (repo / name).write_text("x")
    hub.repos["someone/tiny"] = repo
    hub.revisions.append("v2")
    options = ("--revision", "v2", "--rank", 4, "--iter", 1, "--calibration", "none", "--format", "dense")
    code, _, err = command("eqft", "someone/tiny", *options, *TOKEN, "--out", tmp_path / "a")
    assert (code, err) == (0, "")
    assert any(path.endswith("/revision/v2") for path, _ in hub.requests)
    wanted = {*(p.name for p in repo.glob("*.safetensors*")), "config.json", "generation_config.json"}
    assert hub.fetched() == wanted
    hub.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, err = command("eqft", "someone/tiny", *options, "--out", tmp_path / "b")
    assert (code, err) == (0, "")
    weights = [contents(tmp_path / name)["model.safetensors"] for name in "ab"]
    assert weights[0] == weights[1]
    assert hub.requests == []
