import json
from dataclasses import replace

import pytest

from qinit.families import FAMILIES
from qinit.grids import GRIDS
from qinit.solver.methods import CALIBRATED, METHODS, STARTS

ROWS = [*METHODS.values(), *CALIBRATED.values()]


def listed(command):
    code, out, err = command("methods", "--json")
    assert (code, err) == (0, "")
    return json.loads(out)["methods"]


def test_the_table_has_every_row_with_its_source_on_one_line(command):
    code, out, err = command("methods")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split() == [
        *("method", "calibration", "grid", "bits", "scales", "rounding", "metric", "schedule", "source"),
    ]
    for row in ROWS:
        assert any(line.split()[0] == row.name and row.source in line for line in lines if not line.startswith(" "))
    assert len([line for line in lines if line.startswith("eqft")]) == 2
    assert "\x1b" not in out


def test_json_has_the_axes_of_every_row(command):
    found = listed(command)
    axes = ("name", "grid", "search", "rounding", "metric", "source")
    key = str
    assert sorted(([row[axis] for axis in axes] for row in found), key=key) == sorted(
        ([getattr(row, axis) for axis in axes] for row in ROWS), key=key
    )
    assert all(row["bits"] == list(GRIDS[row["grid"]].bits) for row in found)
    assert {row["name"] for row in found if row["calibration"] == "needed"} == {
        name for name, row in METHODS.items() if row.needs
    }


def test_every_start_is_listed_with_its_bases_and_what_it_takes_the_place_of(command):
    found = {row["name"]: row for row in json.loads(command("methods", "--json")[1])["starts"]}
    assert found.keys() == STARTS.keys()
    assert {name for name, row in found.items() if row["base"] == "W"} == {"lora", "rslora", "dora", "eva"}
    assert all(row["factors"] and row["peft"] and "trl" in row["trainers"] for row in found.values())
    assert found["pissa"]["bits"] == [2, 3, 4, 8, 16]
    packed = {name: set(row["packed_bases"]) for name, row in found.items()}
    assert (packed["eva"] - packed["dora"], packed["pissa"]) == ({"gptq", "awq", "auto-round"}, set())
    lines = command("methods")[1].splitlines()
    for name, row in STARTS.items():
        assert any(line.split()[:1] == [name] and row.source in line for line in lines)


def test_every_family_is_listed_with_its_configuration_and_paper(command):
    found = {row["name"]: row for row in json.loads(command("methods", "--json")[1])["families"]}
    assert found.keys() == FAMILIES.keys()
    assert {name for name, row in found.items() if row["rank"]} == {name for name, row in FAMILIES.items() if row.rank}
    lines = command("methods")[1].splitlines()
    for name, row in FAMILIES.items():
        assert any(line.split()[:2] == [name, row.config] and row.paper in line for line in lines)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("qlora", ["quantize W, no low rank (plain LoRA start)"]),
        ("loftq", ["quantize first", "5 rounds", "last round kept"]),
        ("qpissa", ["low rank of W first, quantize the rest, low rank kept"]),
        ("lqer", ["quantize first", "1 round", "singular values in B"]),
        ("eora", ["quantize first", "1 round"]),
        ("cloq", ["MagR", "quantize first", "1 round", "singular values in A", "ridge 0.01"]),
        ("srr", ["part of the rank for W first", "1 round", "singular values in B"]),
        ("lq-lora", ["low rank first", "at most 100 rounds, until the error rises", "last round kept"]),
    ],
)
def test_a_published_schedule_is_said_in_words(command, name, words):
    assert [row["schedule"] for row in listed(command) if row["name"] == name] == [words]


def test_eqft_is_listed_with_and_without_calibration(command):
    without, with_it = (row for row in listed(command) if row["name"] == "eqft")
    assert (without["calibration"], with_it["calibration"]) == ("none", "where there is some")
    assert without["schedule"] == [
        "low rank first at 2 bits and where A and B have at least 1/4 of the layer's weights, else quantize first",
        *("5 rounds (--iter)", "over-relaxed by 2 where low rank is first", "best round kept"),
    ]
    assert with_it["schedule"] == [
        "low rank first where A and B have at least 1/4 of the layer's weights, else quantize first",
        f"{CALIBRATED['eqft'].iterations} rounds (--iter)",
        *("coordinate descent on codes and scales", "last round kept"),
    ]


def test_the_help_of_iter_says_the_rounds_of_the_table(command):
    text = " ".join(command("eqft", "--help")[1].replace("│", " ").split())
    assert f"{CALIBRATED['eqft'].iterations}, without calibration {METHODS['eqft'].iterations})" in text


def test_a_new_row_of_the_table_is_listed(command, monkeypatch):
    monkeypatch.setitem(METHODS, "mine", replace(METHODS["loftq"], name="mine", grid="int", iterations=7))
    row = next(row for row in listed(command) if row["name"] == "mine")
    assert (row["grid"], row["schedule"][1]) == ("int", "7 rounds")
    assert any(line.startswith("mine ") for line in command("methods")[1].splitlines())


def test_it_takes_no_argument(command):
    assert command("methods", "loftq")[0] == 2
