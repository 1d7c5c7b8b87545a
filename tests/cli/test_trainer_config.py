"""`qinit trainer-config` as a user calls it."""

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
