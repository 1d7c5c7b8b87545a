import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="pip install 'qinit[report]'")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def picture(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import picture

    yield picture
    sys.modules.pop("picture", None)


@pytest.fixture
def result(picture):
    return json.loads(picture.RESULT.read_text())


def test_the_picture_has_the_numbers_of_the_result(picture, result):
    assert picture.PICTURE.read_text().count(picture.described(result).replace(">", "&gt;")) == 1


def test_the_same_result_gives_the_same_bytes(picture, result):
    assert picture.draw(result) == picture.draw(result)


def test_what_is_drawn_is_what_the_table_shows(picture, result):
    points = picture.series(result)
    assert {name: [round(bits) for bits, *_ in found] for name, found in points.items()} == {
        "lora": [16],
        **{name: [2, 3, 4] if name == "eqft" else [2, 4, 4] for name in picture.METHODS},
    }
    eqft = next(row for row in result["rows"] if (row["method"], row["bits"]) == ("eqft", 2))
    assert points["eqft"][0] == (
        eqft["bits_per_weight"],
        eqft["start"]["code"],
        eqft["end"]["code"]["mean"],
        eqft["end"]["code"]["spread"],
    )


def test_it_is_drawn_where_it_is_told(picture, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["picture.py", str(tmp_path / "out.svg")])
    picture.main()
    text = (tmp_path / "out.svg").read_text()
    assert text.startswith("<?xml")
    assert all(f">{label}</text>" in text for label, _, _ in picture.METHODS.values())
