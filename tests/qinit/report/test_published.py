import dataclasses

import pytest

from qinit.report.published import Published, hub_id_of
from tests.qinit.report.reports import report


@pytest.mark.parametrize(
    ("place", "found"),
    [
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("/home/me/hub/models--Qwen--Qwen2.5-0.5B/snapshots/0123abc", "Qwen/Qwen2.5-0.5B"),
        ("/home/me/models/Qwen2.5-0.5B", None),
        ("models--a--b", "models--a--b"),
    ],
)
def test_the_hub_s_id_is_known_by_itself_and_by_the_cache(place, found):
    assert hub_id_of(place) == found


def test_paths_from_the_root_are_taken_out_wherever_a_report_has_them():
    own = report()
    recipe = {**own.recipe, "base": "models/base", "model": "/home/me/model", "calibration": "/home/me/text.jsonl"}
    totals = {**own.totals, "base": {"name": "/home/me/models/base", "form": "gptq"}}
    notes = ("the base at /home/me/models/base has it",)
    command = "qinit adapter models/base --source /home/me/model --out '/home/me/an adapter'"
    own = dataclasses.replace(own, model="/home/me/model", recipe=recipe, totals=totals, notes=notes, command=command)
    found = Published.of(own, "a/b").report
    assert "/home" not in found.to_json()
    assert (found.recipe["base"], found.totals["base"]["name"], found.model) == ("a/b", "a/b", "model")
    assert found.command == "qinit adapter a/b --source model --out 'an adapter'"
    assert found.notes == ("the base at a/b has it",)
    assert found.layers == own.layers
