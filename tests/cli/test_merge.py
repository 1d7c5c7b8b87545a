import json
import shutil
from pathlib import Path

import pytest

from tests.helpers import names, quantize
from tests.hub_stand_in import WRITER
from tests.models import make_reader


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_merge_is_made_verified_and_pushed(command, run, hub):
    code, out, err = command("merge", run, "--out", "out")
    assert (code, err) == (0, "")
    assert "changed                14 parameters" in out
    assert '    model = LlamaForCausalLM.from_pretrained("out", dtype="auto")' in out
    code, out, _ = command("verify", "out", "--source", run)
    assert code == 0
    assert "out: sound (5 files by their hashes, 21 tensors by their values, 14 layers by their errors" in out
    assert command("verify", "out")[0] == 0
    code, _, err = command("verify", "out", "--adapter", run / "eqft_init")
    assert (code, "was made from too, with --source RUN" in err) == (2, True)
    code, out, _ = command("push", "out", "me/merged", "--token", WRITER)
    assert code == 0
    assert '    model = LlamaForCausalLM.from_pretrained("me/merged", dtype="auto")' in out
    pushed = hub.files("me/merged")
    assert pushed.keys() == {*names(Path("out")), ".gitattributes"}
    assert b'from_pretrained("me/merged", dtype="auto")' in pushed["README.md"]
    code, _, err = command("push", "out", "me/merged", "--adapter", run / "eqft_init", "--token", WRITER)
    assert (code, "is a merge, so that an adapter is in it already" in err) == (2, True)
    Path("out/config.json").write_text("{}")
    code, _, err = command("push", "out", "me/merged", "--dry-run")
    assert (code, "out/config.json: is not what" in err) == (2, True)
    assert command("verify", "out")[0] == 3


def test_json_and_quiet(command, run):
    code, out, _ = command("merge", run, "--out", "out", "--dtype", "float32", "--json")
    found = json.loads(out)
    assert (code, found["directory"], found["dtype"]) == (0, str(Path("out").resolve()), "float32")
    assert found["command"] == f"qinit merge {run} --out out --dtype float32 --json"
    assert command("merge", run, "--out", "quiet", "--quiet") == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gone", "--out", "out"], "gone: no such directory; pass the directory that `qinit eqft` wrote"),
        (["RUN", "--out", "out", "--adapter", "gone"], "gone: no such directory; --adapter takes what PEFT has saved"),
        (["RUN", "--out", "out", "--dtype", "float23"], "--dtype: no 'float23' (did you mean 'float32'?)"),
        (["RUN", "--out", "RUN"], "is, holds or lies in"),
        (["RUN", "--out", "out", "--requantize", "5"], "bits: method eqft offers 2, 3, 4 or 8, found 5"),
        (["RUN", "--out", "out", "--device", "cpu"], "--device: is about --requantize, which is not given"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(command, run, arguments, words):
    code, out, err = command("merge", *(str(run) if word == "RUN" else word for word in arguments))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert names(Path.cwd()) == []


def test_requantize_says_what_it_costs(command, tmp_path):
    quantize(make_reader(tmp_path / "source", initializer_range=0.1), tmp_path / "run", bits=4)
    code, out, err = command("merge", tmp_path / "run", "--out", "out", "--requantize", "4", "--device", "cpu")
    assert (code, err) == (0, "")
    assert "4 bits, gptq" in out
    assert "KL from the merged model" in out
    assert command("verify", "out")[0] == 0
    assert names(Path.cwd()) == ["out"]
