"""`qinit export`, as a user runs it."""

import json

import pytest

from tests.helpers import quantize
from tests.models import make_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("export")
    quantize(make_checkpoint(place / "source"), place / "run")
    return place / "run"


def test_what_is_lost_needs_a_word_and_the_result_is_told(run, command):
    code, _, error = command("export", run, "--to", "dense")
    assert code == 2
    assert "become bfloat16" in error
    assert "--requantize writes it all the same" in error
    code, output, error = command("export", run, "--to", "dense", "--requantize", "--json")
    assert code == 0, error
    result = json.loads(output)
    place = run.with_name("run-dense")
    assert result["directory"] == str(place)
    assert result["files"]["config.json"] == (place / "config.json").stat().st_size
    assert command("verify", place, "--source", run)[0] == 0
    assert command("verify", place)[0] == 0
    code, _, error = command("verify", place, "--adapter", run / "eqft_init")
    assert (code, "was made from too, with --source RUN" in error) == (2, True)
    assert "exists; choose another place with --out" in command("export", run, "--to", "dense", "--requantize")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("nowhere", "--to", "dense"), "no such directory"), (("nowhere", "--to", "dens"), "did you mean 'dense'?")],
)
def test_bad_input_is_one_line(arguments, message, command):
    code, _, error = command("export", *arguments)
    assert code == 2
    assert message in error
    assert len(error.splitlines()) == 1
