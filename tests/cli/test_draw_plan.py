import json

import pytest
from qinit_cli.draw import Screen
from qinit_cli.draw_plan import draw_plan, write_plan

from qinit.machine import Card
from qinit.planner.forecast import Asked, Forecast
from qinit.planner.time import Estimate
from tests.helpers import plan_of
from tests.models import make_checkpoint


@pytest.fixture
def said(tmp_path):
    """A plan in which some layers are kept, on two cards that were measured elsewhere."""
    plan = plan_of(make_checkpoint(tmp_path / "m", intermediate_size=80), iter=1)
    card = Card("card", "cuda", 2_000_000)
    return Forecast(plan, card, "by a guess", Asked(2, 100, 3), Estimate(solving=3.0))


def test_the_plan_lists_every_layer_and_why_it_is_kept(said, tmp_path, capsys):
    draw_plan(Screen(), said, tmp_path / "out")
    text = capsys.readouterr().out
    for layer in said.plan.layers:
        assert any(line.lstrip().startswith(layer.target.name + " ") for line in text.splitlines())
    assert "8 quantized of 14 linear" in text
    assert "not divisible by 32" in text
    assert str(tmp_path / "out") in text


def test_it_says_where_how_long_and_what_comes_after(said, tmp_path, capsys):
    draw_plan(Screen(), said, tmp_path / "out")
    text = capsys.readouterr().out
    assert "2 x card, 2.0 MB each" in text
    assert "about 3 s on 2 x card (3 s to solve), by a guess" in text
    assert "fine-tuning on 3 x 100 tokens" in text
    (with_it,) = (line for line in text.splitlines() if line.startswith("with gradient checkpointing"))
    (without,) = (line for line in text.splitlines() if line.startswith("without"))
    assert with_it.rstrip().endswith(" fits into 2.0 MB")
    assert without.rstrip().endswith("does not fit into 2.0 MB")


def test_json_has_the_same(said, tmp_path, capsys):
    write_plan(said, tmp_path / "out")
    value = json.loads(capsys.readouterr().out)
    assert (value["processes"], value["device"]["memory"], value["seconds"]["total"]) == (2, 2_000_000, 3.0)
    tuning = value["fine_tuning"]
    assert (tuning["length"], tuning["batch"]) == (100, 3)
    assert tuning["without"]["total"] > tuning["checkpointing"]["total"] > tuning["without"]["base"] > 0


def test_quiet_says_nothing(said, tmp_path, capsys):
    draw_plan(Screen(quiet=True), said, tmp_path / "out")
    assert capsys.readouterr() == ("", "")
