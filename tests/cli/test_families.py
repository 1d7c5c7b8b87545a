"""`qinit adapter --method NAME` for families that are no LoRA, as a user calls it."""

import json

import pytest

from tests.helpers import names


def test_an_adapter_is_written_and_said_how_to_load(command, llama, tmp_path):
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "total_step": 4000}))
    code, out, err = command("adapter", llama, "--recipe", config, "--rank", 6, "--out", "out", "--json")
    assert code == 0, err
    assert "total_step" in err
    result = json.loads(out)
    assert (result["method"], result["modules"]) == ("adalora", 14)
    assert names(tmp_path / "cwd/out") == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    saved = json.loads((tmp_path / "cwd/out/adapter_config.json").read_text())
    assert [saved[key] for key in ("init_r", "target_r", "total_step", "tinit")] == [6, 2, 4000, 500]
    assert "\n".join(result["snippet"]) in (tmp_path / "cwd/out/README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--method", "ia3", "--use-rslora"), "--use-rslora: PEFT starts ia3 by itself"),
        (("--method", "ia3", "--calibration", "text"), "--calibration: PEFT starts ia3 by itself"),
        (("--method", "oft", "--target-modules", "c_attn"), "no linear module is named 'c_attn'"),
        (("--recipe", "nowhere.json"), "nowhere.json: cannot be read"),
        (("--method", "adalra"), "--method: no 'adalra' (did you mean 'adalora'?)"),
        (("--rank", 4), "--source"),
    ],
)
def test_bad_input_is_one_line(arguments, what, command, llama, tmp_path):
    code, out, err = command("adapter", llama, *arguments, "--out", "out")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert what in err
    assert names(tmp_path / "cwd") == []
