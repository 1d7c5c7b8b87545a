from pathlib import Path

from qinit.compare import comparison as comparison_module
from qinit.compare.comparison import Cell, Row
from qinit.compare.texts import Text
from qinit.recipe import make_recipe
from qinit.train.finetune import Training
from tests.qinit.compare.comparisons import TEXTS, comparison


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
