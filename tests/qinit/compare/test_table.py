from pathlib import Path

import numpy as np
import pytest

from qinit.compare import comparison as comparison_module
from qinit.compare.comparison import FULL, LORA, Cell, Comparison, Row
from qinit.compare.pictures import page, panels, png
from qinit.compare.schedule import best_rate, next_cells
from qinit.compare.table import document, failures, header, lines, rows, sweep_lines, title
from qinit.compare.texts import Text
from qinit.recipe import make_recipe
from qinit.train.finetune import Training

TEXTS = (Text("one | two", np.arange(8)), Text("other", np.arange(9)))


def comparison(**changes):
    recipe = make_recipe(method="loftq", format="dense", calibration="none")
    table = (
        Row(LORA, 16, None, (0.1, 0.2), 16.0),
        Row("loftq", 2, recipe, (0.1, 0.2), 2.5),
        Row("loftq", 3, recipe, (0.1, 0.2), 3.5),
    )
    values = {"model": "m", "directory": Path("m"), "out": Path("out"), "rows": table, "texts": TEXTS, "window": 4}
    values |= {
        "training": Training(5),
        "learn": Text("t", np.arange(90)),
        "validation": Text("t, its end", np.arange(9)),
    }
    values |= {"seeds": (0, 1, 2), "device": "cpu", "fingerprint": "f"}
    return Comparison(**{**values, **changes})


def found_for(made):
    """Return results of every cell: an end is 10 and the row's number, the seed and ten times the rate more."""
    found = {}
    for number, row in enumerate(made.rows):
        found[Cell(row)] = {"perplexities": [20.0 + number, 30.0], "weight_error": number / 10}
        for rate in row.rates:
            for seed in made.seeds:
                value = 10 + number + seed + 10 * rate
                found[Cell(row, rate, seed)] = {"validation": value + 1, "perplexities": [value, 2 * value]}
    return found


def result_of(made, found):
    texts = [{"name": text.name, "tokens": len(text.ids)} for text in made.texts]
    value = {"model": "m", "rank": 4, "window": 4, "training": {"steps": 5, "batch": 8, "length": 128}}
    value |= {"learn": {"name": "t"}, "seeds": list(made.seeds), "texts": texts, "rows": rows(made, found)}
    value |= {"command": "qinit compare <m>", "validation_tokens": 9, "versions": {"qinit": "1"}}
    return value | {"machine": {"cpu": "c", "cores": 2, "gpu": None}}


class TestTable:
    def test_means_spreads_and_differences_seed_by_seed(self):
        made = comparison()
        lora, loftq, _ = rows(made, found_for(made))
        assert lora["rate"] == loftq["rate"] == 0.1
        assert lora["end"]["one | two"] == {"mean": 12, "spread": 1, "seeds": {"0": 11, "1": 12, "2": 13}}
        assert loftq["end"]["other"]["mean"] == 26
        assert loftq["to_lora"] == {"one | two": pytest.approx(13 / 12), "other": pytest.approx(26 / 24)}
        assert loftq["less_lora"]["one | two"] == {"mean": 1, "spread": 0}
        assert loftq["start"] == {"one | two": 21, "other": 30}

    def test_a_seed_that_is_missing_is_left_out_of_the_pairs(self):
        made = comparison()
        found = found_for(made)
        found[Cell(made.rows[1], 0.1, 1)] = {"failed": "no room"}
        loftq = rows(made, found)[1]
        assert loftq["end"]["one | two"]["seeds"] == {"0": 12, "2": 14}
        assert loftq["less_lora"]["one | two"]["mean"] == 1
        assert loftq["failed"] == ["no room"]

    def test_nothing_yet_is_a_dash(self):
        made = comparison()
        result = result_of(made, {})
        assert lines(result)[1] == ["2", "loftq", "2.500", *["-"] * 9]
        assert len(header(result)) == 12
        assert failures(result) == []

    def test_every_learning_rate_is_shown(self):
        made = comparison()
        found = found_for(made)
        found[Cell(made.rows[1], 0.2, 0)] = {"diverged": "at step 2", "validation": None, "perplexities": None}
        swept = sweep_lines(result_of(made, found))
        assert swept[2] == ["2", "loftq", "0.1", "13.000", "12.000", "24.000", "yes"]
        assert swept[3] == ["2", "loftq", "0.2", "-", "-", "-", "diverged"]

    def test_markdown_keeps_its_columns(self):
        made = comparison()
        result = result_of(made, found_for(made))
        text = document(result)
        assert "start one \\| two" in text
        for line in text.splitlines():
            if line.startswith("| 2 |"):
                assert line.replace("\\|", "").count("|") in (len(header(result)) + 1, 8)
        assert title(result) in text


class TestSchedule:
    def test_a_row_goes_from_its_start_over_the_sweep_to_the_seeds(self):
        made = comparison()
        row, whole, found = made.rows[1], found_for(made), {}
        assert next_cells(made, row, found) == [Cell(row)]
        found[Cell(row)] = whole[Cell(row)]
        assert next_cells(made, row, found) == [Cell(row, 0.1, 0), Cell(row, 0.2, 0)]
        found |= {cell: whole[cell] for cell in next_cells(made, row, found)}
        assert best_rate(made, row, found) == 0.1
        assert next_cells(made, row, found) == [Cell(row, 0.1, 1), Cell(row, 0.1, 2)]
        found |= {cell: whole[cell] for cell in next_cells(made, row, found)}
        assert next_cells(made, row, found) == []
        assert made.cells == 3 * len(found)

    def test_a_failed_start_ends_the_row(self):
        made = comparison()
        assert next_cells(made, made.rows[1], {Cell(made.rows[1]): {"failed": "no"}}) == []


class TestSignature:
    def test_it_is_about_what_a_cell_depends_on(self):
        made = comparison()
        start, end = Cell(made.rows[1]), Cell(made.rows[1], 0.1, 0)
        longer = comparison(training=Training(6))
        assert made.signature(start) == longer.signature(start)
        assert made.signature(end) != longer.signature(end)
        assert made.signature(end) != made.signature(Cell(made.rows[1], 0.1, 1))
        assert made.signature(start) != comparison(window=3).signature(start)
        assert made.signature(start) != comparison(fingerprint="g").signature(start)
        renamed = tuple(Text(text.name + "x", text.ids) for text in TEXTS)
        assert made.signature(end) == comparison(texts=renamed, out=Path("elsewhere")).signature(end)

    def test_every_module_that_is_left_out_of_it_is_there(self):
        package = Path(comparison_module.__file__).parent.parent
        for name in comparison_module.UNINVOLVED:
            assert (package / name).exists()

    def test_another_solver_makes_another_signature(self, monkeypatch):
        cell = Cell(comparison().rows[1])
        before = comparison().signature(cell)
        monkeypatch.setattr(comparison_module, "code", lambda: "other")
        assert comparison().signature(cell) != before

    def test_a_calibration_file_counts_by_what_it_holds(self, tmp_path):
        file = tmp_path / "text.txt"

        def signature():
            recipe = make_recipe(calibration=str(file), format="dense")
            row = Row("eqft", 2, recipe, (0.1,), 2.4)
            return comparison(rows=(row,)).signature(Cell(row))

        file.write_text("one")
        first = signature()
        assert signature() == first
        file.write_text("two")
        assert signature() != first


class TestPictures:
    def test_what_is_drawn(self):
        made = comparison()
        result = result_of(made, found_for(made))
        drawn = panels(result)
        titles = ["Start, one | two", "End, one | two", "Start, other", "End, other"]
        assert [panel.title for panel in drawn] == titles
        assert [panel.widths for panel in drawn] == [[2, 3]] * 4
        (series,) = drawn[1].series
        assert [(x, y, spread) for x, y, spread, _ in series.points] == [(0, 13, 1), (1, 14, 1)]
        assert series.points[0][3] == "loftq, 2 bits (2.500 as stored): 13.000 ± 1.000"
        assert drawn[1].levels == [(LORA, "16-bit LoRA", 12)]
        assert drawn[0].levels == [(LORA, "full precision", 20)]
        assert png(result)[1:4] == b"PNG"
        text = page(result).decode()
        assert "qinit compare &lt;m&gt;" in text
        assert text.count("<th>") > len(header(result))

    def test_a_comparison_without_results_is_an_empty_picture(self):
        made = comparison(training=None, rows=(Row(FULL, 16, None, (), 16.0),))
        result = {**result_of(made, {}), "training": None}
        assert panels(result) == []
        assert png(result)[1:4] == b"PNG"
