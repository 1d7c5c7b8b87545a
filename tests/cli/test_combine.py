import json
import shutil
from pathlib import Path

import pytest

from tests.helpers import names


@pytest.fixture
def adapters(finished, tmp_path):
    """Two adapters as training that changed nothing would leave them, as the option takes them."""
    return ",".join(str(shutil.copytree(finished / "eqft_init", tmp_path / name)) for name in "ab")


def test_adapters_become_one_that_is_merged_in_turn(command, finished, adapters):
    code, out, err = command("merge", "--adapters", adapters, "--weights", "0.7,0.3", "--out", "out")
    assert (code, err) == (0, "")
    assert "2 adapters combined, linear" in out
    assert "training added 0.000 of the start" in out
    assert command("merge", finished, "--adapter", "out", "--out", "merged")[0] == 0
    assert command("verify", finished, "--adapter", "out")[0] == 0


def test_json_and_quiet(command, finished, adapters):
    options = ["--adapters", adapters, "--weights", "1,1", "--combination", "dare_ties", "--density", "0.4"]
    code, out, _ = command("merge", finished, *options, "--out", "out", "--json")
    found = json.loads(out)
    assert (code, found["directory"], found["density"]) == (0, str(Path("out").resolve()), 0.4)
    assert command("merge", *options, "--out", "quiet", "--quiet") == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "DIR: missing; give a run's directory, or several adapters with --adapters A,B"),
        (["RUN", "--weights", "1,1"], "--weights: is about --adapters, which is not given"),
        (["--adapters", "A,B", "--dtype", "float32"], "--dtype: is about a merge into the base"),
        (["--adapters", "A,B", "--weights", "1,x"], "--weights: expected numbers, as 0.7,0.3; found '1,x'"),
        (["--adapters", "A,gone", "--weights", "1,1"], "gone: no such directory; --adapters takes what PEFT has saved"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(command, finished, adapters, arguments, words):
    a = adapters.partition(",")[0]
    given = [{"RUN": str(finished), "A,B": adapters, "A,gone": f"{a},gone"}.get(word, word) for word in arguments]
    code, out, err = command("merge", *given, "--out", "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert names(Path.cwd()) == []
