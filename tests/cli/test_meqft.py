"""`qinit meqft` and `qinit plan` as a user runs them."""

import json
from pathlib import Path

import pytest
import yaml

from tests.helpers import weights_of
from tests.models import make_checkpoint

QUICK = ("--rank", 4, "--iter", 1, "--group-size", 32)
HALF = (*QUICK, "--ratio", 0.5)
RULE = ("--allocation", "random")


def report_of(directory):
    return json.loads((Path(directory) / "qinit.json").read_text())


class TestMeqft:
    def test_a_run_measures_and_says_what_it_chose(self, command, tiny_llama):
        code, out, err = command("meqft", tiny_llama, *HALF)
        assert code == 0, err
        directory = Path("model_zoo/meqft/tiny-llama-2.5bit-4rank")
        assert "widths: 2 bits: " in out
        assert "predicted loss: " in out
        assert (directory / "sensitivity.json").is_file()
        report = report_of(directory)
        assert {row["bits"] for row in report["layers"]} == {2, 3}
        assert report["totals"]["grid_bits_per_weight"] <= (2 + 18 / 32 + 3 + 19 / 32) / 2
        assert report["totals"]["allocation"]["allocation"] == "sensitivity"
        code, out, err = command("meqft", tiny_llama, *HALF, "--sensitivity", directory / "sensitivity.json",
                                 "--out", "again")  # fmt: skip
        assert code == 0, err
        assert weights_of(Path("again")) == weights_of(directory)
        assert report_of("again")["recipe"]["sensitivity"] == str(directory / "sensitivity.json")

    def test_without_a_model_it_is_the_demo(self, command):
        few = ("--target-modules", "v_proj", "--allocation", "first")
        code, out, err = command("meqft", *QUICK, "--target-bits", 4, *few)
        assert (code, err) == (0, "")
        assert "No MODEL given: using " in out
        assert Path("model_zoo/meqft/demo-4bit-4rank/qinit.json").is_file()

    def test_every_option_reaches_the_recipe(self, command, tiny_llama):
        options = {"target_bits": 3.5, "bits_choices": "2,3,8", "tie": "fused", "rank_budget": "100KB"}
        flags = [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), value)]
        assert command("meqft", tiny_llama, *QUICK, *flags, "--format", "gptq", "--out", "out")[0] == 0
        report = report_of("out")
        assert {key: report["recipe"][key] for key in options} == {**options, "bits_choices": [2, 3, 8]}
        assert report["recipe"]["format"] == "gptq"
        assert report["totals"]["adapter_bytes"] <= 100_000
        options = {"ratio": 0.25, "bits_low": 3, "bits_high": 8, "allocation": "last"}
        flags = [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), value)]
        assert command("meqft", tiny_llama, *QUICK, *flags, "--out", "other")[0] == 0
        assert {key: report_of("other")["recipe"][key] for key in options} == options

    @pytest.mark.parametrize("where", ["qinit.json", "README.md"])
    def test_the_recipe_of_a_run_reproduces_it(self, command, tiny_llama, where):
        assert command("meqft", tiny_llama, *HALF, "--out", "one")[0] == 0
        text = (Path("one") / where).read_text()
        recipe = json.loads(text)["recipe"] if where == "qinit.json" else text.split("```yaml\n")[1].split("```")[0]
        Path("again.yaml").write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))
        assert command("meqft", "--recipe", "again.yaml", "--out", "two")[0] == 0
        assert weights_of(Path("two")) == weights_of(Path("one"))

    def test_json_is_one_line_on_stdout(self, command, tiny_llama):
        code, out, _ = command("meqft", tiny_llama, *HALF, "--json", "--out", "out")
        assert code == 0
        assert json.loads(out)["totals"]["allocation"]["chosen"]
        assert out.count("\n") == 1

    def test_a_dry_run_reads_no_weights_and_measures_nothing(self, command, tiny_llama, monkeypatch):
        from qinit.files.tensors import StoredTensor

        monkeypatch.setattr(StoredTensor, "read", None)
        code, out, err = command("meqft", tiny_llama, *HALF, "--dry-run")
        assert (code, err) == (0, "")
        assert "the run measures how sensitive each layer is" in out
        assert "model_zoo/meqft/tiny-llama-2.5bit-4rank" in out
        assert not list(Path().iterdir())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ((), "meqft: give --ratio (0 to 1), --target-bits or --target-size; for one width use qinit eqft"),
            (("--ratio", 1.5), "ratio: input should be less than or equal to 1, found 1.5"),
            (("--ratio", -1), "ratio: input should be greater than or equal to 0, found -1.0"),
            (("--ratio", "nan"), "ratio: input should be a finite number, found nan"),
            (("--ratio", 0.5, "--target-bits", 3), "target_bits: give it or ratio, not both"),
            (("--target-bits", 1), "target_bits: 1 bits per weight cannot be had"),
            (("--target-bits", 3, "--bits-choices", "2,x"), "bits_choices: expected widths like 2,3,4, found '2,x'"),
            (("--ratio", 0.5, "--rank-budget", "1KB"), "rank_budget: 1KB are too few"),
            (("--ratio", 0.5, "--rank-budget", "1MB", *RULE), "rank_budget: needs allocation sensitivity"),
            (("--bits-low", 2), "bits_low: is about mixed widths; give ratio, target_bits or target_size"),
            (("--ratio", 0.5, "--sensitivity", "gone.json"), "sensitivity: gone.json cannot be read"),
            (("--ratio", 0.5, "--sensitivity", "bad.json"), "sensitivity: bad.json is no sensitivity.json of qinit"),
            (("--ratio", 0.5, "--sensitivity", "other.json"), "other.json was measured for another model"),
        ],
    )
    def test_bad_input_is_one_line_and_leaves_nothing(self, command, tiny_llama, options, message):
        Path("bad.json").write_text('{"layers": 3}')
        Path("other.json").write_text('{"layers": {}, "signature": {"model": "1"}, "how": ""}')
        for subcommand in ("meqft", "meqft --dry-run", "plan"):
            if subcommand == "plan" and not any("-" in str(option) for option in options):
                continue  # without a ratio it is a plan for eqft
            code, out, err = command(*subcommand.split(), tiny_llama, *QUICK, *options)
            assert (code, out) == (2, "")
            assert err.startswith(f"error: {message}") or (err.startswith("error: ") and message in err)
            assert err.count("\n") == 1
        assert {path.name for path in Path().iterdir()} == {"bad.json", "other.json"}

    def test_bits_is_no_option_of_it(self, command, tiny_llama):
        code, _, err = command("meqft", tiny_llama, "--bits", 3, "--ratio", 0.5)
        assert code == 2
        assert "No such option" in err


class TestPlan:
    def test_of_one_width(self, command, tiny_llama):
        code, out, err = command("plan", tiny_llama, *QUICK, "--bits", 3)
        assert (code, err) == (0, "")
        assert "method eqft, format gptq" in out
        assert "model_zoo/eqft/tiny-llama-3bit-4rank" in out
        assert "time" in out
        assert not list(Path().iterdir())

    def test_of_mixed_widths_by_a_rule_is_what_the_run_writes(self, command, tiny_llama):
        code, out, _ = command("plan", tiny_llama, *HALF, *RULE, "--json")
        assert code == 0
        planned = json.loads(out)
        assert command("meqft", tiny_llama, *HALF, *RULE)[0] == 0
        report = report_of(planned["directory"])
        assert Path(planned["directory"]) == Path("model_zoo/meqft/tiny-llama-2.5bit-4rank").resolve()
        assert [layer["bits"] for layer in planned["layers"]] == [row["bits"] for row in report["layers"]]
        assert (planned["base_bytes"], planned["adapter_bytes"]) == (
            *(report["totals"]["base_bytes"], report["totals"]["adapter_bytes"]),
        )
        assert planned["seconds"]["total"] > 0
        assert planned["recipe"]["ratio"] == 0.5

    def test_with_a_sensitivity_file_the_widths_are_those_of_the_run(self, command, tiny_llama):
        assert command("meqft", tiny_llama, *HALF, "--out", "one")[0] == 0
        code, out, _ = command("plan", tiny_llama, *HALF, "--sensitivity", "one/sensitivity.json", "--json")
        assert code == 0
        rows = report_of("one")["layers"]
        assert [layer["bits"] for layer in json.loads(out)["layers"]] == [row["bits"] for row in rows]
        assert not any("spread evenly" in note for note in json.loads(out)["notes"])

    def test_of_one_budget_for_base_and_adapter_it_says_what_more_would_buy(self, command, tiny_llama):
        size = (*QUICK, "--target-size", "200KB")
        code, out, err = command("meqft", tiny_llama, *size)
        assert code == 0, err
        one = Path("model_zoo/meqft/tiny-llama-200KB")
        totals = report_of(one)["totals"]
        assert totals["allocation"]["nats_per_megabyte"].keys() == {"bits", "group_size", "rank"}
        code, planned, err = command("plan", tiny_llama, *size, "--sensitivity", one / "sensitivity.json")
        assert code == 0, err
        for said in (out, planned):
            assert "group sizes: " in said
            assert "ranks: " in said
            assert "a megabyte more would win, in predicted nats: " in said

    @pytest.mark.parametrize("options", [("--bits", 2), ("--ratio", 0.5)])
    def test_of_a_model_on_the_hub_fetches_headers_alone(self, command, hub, tmp_path, options):
        repo = make_checkpoint(tmp_path / "repo", hidden_size=256, intermediate_size=1024, vocab_size=2000)
        hub.repos["someone/tiny"] = repo
        code, out, err = command("plan", "someone/tiny", *QUICK, *options, "--json")
        assert code == 0, err
        served = hub.served["model.safetensors"]
        assert served <= 100_001  # what huggingface_hub fetches of a file for its header
        assert served < (repo / "model.safetensors").stat().st_size / 20
        local = json.loads(command("plan", repo, *QUICK, *options, "--json")[1])
        found = json.loads(out)
        for key in ("layers", "base_bytes", "adapter_bytes", "bits_per_weight", "working_bytes"):
            assert found[key] == local[key]
        assert Path(found["directory"]).name == ("tiny-2bit-4rank" if "--bits" in options else "tiny-2.5bit-4rank")
        assert not list(Path().iterdir())

    def test_of_a_model_on_the_hub_a_sensitivity_file_is_refused_without_its_weights(self, command, hub, tmp_path):
        repo = make_checkpoint(tmp_path / "tiny", hidden_size=256, intermediate_size=1024, vocab_size=2000)
        hub.repos["someone/tiny"] = repo
        assert command("meqft", repo, *HALF, "--out", "one")[0] == 0
        code, out, err = command("plan", "someone/tiny", *HALF, "--sensitivity", "one/sensitivity.json")
        assert (code, out) == (2, "")
        assert err.endswith("holds a header only, for a plan\n")
