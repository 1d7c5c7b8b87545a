"""`qinit trainer-config` as a user calls it."""

import json

import yaml


def test_it_writes_to_stdout_or_into_a_file_with_the_command_that_takes_it(command, finished):
    code, text, errors = command("trainer-config", finished, "--trainer", "axolotl")
    assert (code, errors) == (0, "")
    assert yaml.safe_load(text)["lora_model_dir"] == f"{finished}/eqft_init"
    code, said, _ = command("trainer-config", finished, "--trainer", "axolotl", "--out", "train.yaml")
    assert (code, said) == (0, "wrote train.yaml; run: axolotl train train.yaml\n")
    code, _, errors = command("trainer-config", finished, "--trainer", "axolotl", "--out", "train.yaml")
    assert (code, errors) == (2, "error: train.yaml: exists; choose another file with --out\n")


def test_a_trainer_that_takes_no_run_is_bad_input_with_a_reason(command, finished):
    code, said, errors = command("trainer-config", finished, "--trainer", "mlx-lm")
    assert (code, said) == (2, "")
    assert errors.startswith("error: --trainer mlx-lm: it reads adapters in a form of its own")
    assert len(errors.splitlines()) == 1


def test_a_template_is_written_for_a_data_set_of_the_hub_with_the_rate_of_a_comparison(command, tmp_path):
    rows = {"rows": [{"method": "lora", "bits": 16, "rate": 0.002}]}
    (tmp_path / "cwd/compared.json").write_text(json.dumps(rows))
    arguments = ("lora_llama2_7b_rank8", "--trainer", "llamafactory", "--dataset", "a/b")
    code, text, errors = command("trainer-config", *arguments, "--compared", "compared.json")
    assert (code, errors) == (0, "")
    values = yaml.safe_load(text)
    assert [values[key] for key in ("lora_rank", "dataset", "dataset_dir", "learning_rate")] == [
        8,
        "a/b",
        "ONLINE",
        0.002,
    ]
    code, said, errors = command("trainer-config", "lora_llama2_7b_rank9", *arguments[1:])
    assert (code, said, "did you mean 'lora_llama2_7b_rank" in errors) == (2, "", True)


def test_what_is_written_is_executed_where_the_trainer_is_installed(command, tmp_path, monkeypatch):
    template = ("lora_llama2_7b_rank4", "--dataset", "a/b", "--execute")
    code, said, errors = command("trainer-config", *template, "--trainer", "llamafactory")
    assert (code, said, errors.count("\n")) == (2, "", 1)
    assert "LLaMA-Factory (llamafactory) is not installed here; pip install llamafactory==" in errors
    seen = []
    monkeypatch.setattr("qinit.trainers.execute.execute", lambda written, file: seen.append(str(file)) or len(seen) - 1)
    for file, code in (("a.py", 0), ("b.py", 1)):
        assert command("trainer-config", *template, "--trainer", "peft", "--out", file)[0] == code
    assert seen == ["a.py", "b.py"]
    assert [path.name for path in sorted((tmp_path / "cwd").iterdir())] == seen
