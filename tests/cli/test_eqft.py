import json
from pathlib import Path

import pytest
import yaml
from qinit_cli.eqft import typed

from qinit.files.tensors import StoredTensor
from qinit.source import demo
from tests.helpers import weights_of
from tests.hub_stand_in import WRITER
from tests.models import make_checkpoint

QUICK = ("--rank", 4, "--iter", 1)
# What a recipe says of calibration when there is none.
UNCALIBRATED = {
    **{"calibration": "none", "text_field": None, "calibration_samples": 128, "calibration_length": 512},
    **{"calibration_mode": "sequential", "rounding": None, "act_order": False, "polish": 0},
    **dict.fromkeys(("ratio", "bits_low", "bits_high", "target_bits", "bits_choices", "sensitivity", "rank_budget")),
    **{"allocation": "sensitivity", "tie": "none", "calibration_budget": "10m", "check": True, "quality": "balanced"},
    **{"count_adapter": False, "target_size": None},
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
            **{"device": "cpu", "use_rslora": True, "symmetric": True},
        }
        flags = []
        for name, value in options.items():
            flags += [f"--{name.replace('_', '-')}"] + ([] if value is True else [value])
        assert command("eqft", tiny_llama, *flags, "--out", "out")[0] == 0
        recipe = json.loads(Path("out/qinit.json").read_text())["recipe"]
        unasked = {"base": None, "method": "eqft", "revision": None, "trust_remote_code": False, **UNCALIBRATED}
        of_starts = {"grid": None, "lora_dropout": 0.0, "niter": None, "corda_method": None, "use_dora": False}
        assert recipe == {"model": str(tiny_llama), **unasked, **of_starts, **options}
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


def test_a_run_that_stock_loaders_would_lose_a_part_of_is_3_and_is_not_pushed(command, hub, tiny_llama, monkeypatch):
    monkeypatch.setattr("qinit.runner.loadable.lost_names", lambda *_, **__: ["PEFT drops x"])
    target = ("--push-to-hub", "me/tiny", "--token", WRITER)
    code, out, _ = command("eqft", tiny_llama, "--format", "dense", "--rank", 4, "--out", "out", *target)
    assert code == 3
    assert "note: check: stock loaders would lose a part of it: PEFT drops x" in out
    assert "not pushed to me/tiny, as stock loaders would lose a part of it" in out
    assert Path("out/qinit.json").is_file()
    assert hub.files("me/tiny").keys() <= {".gitattributes"}


def test_the_command_is_quoted_and_without_the_token():
    assert typed(["eqft", "my model", "--token", "2", "--bits", "2"]) == (
        "qinit eqft 'my model' --token $HF_TOKEN --bits 2"
    )
    assert typed(["eqft", "caf\udce9"]) == "qinit eqft 'caf\\udce9'"
    assert typed(["eqft", "--token=hf_x"]) == "qinit eqft --token=$HF_TOKEN"
