from pathlib import Path

from qinit.compare import comparison as comparison_module
from qinit.compare.comparison import Cell, Row
from qinit.compare.texts import Text
from qinit.recipe import make_recipe
from qinit.train.finetune import Training
from tests.qinit.compare.comparisons import TEXTS, comparison


class TestDigest:
    def test_it_is_about_what_a_cell_depends_on(self):
        made = comparison()
        start, end = Cell(made.rows[1]), Cell(made.rows[1], 0.1, 0)
        longer = comparison(training=Training(6))
        assert made.digest(start) == longer.digest(start)
        assert made.digest(end) != longer.digest(end)
        assert made.digest(end) != made.digest(Cell(made.rows[1], 0.1, 1))
        assert made.digest(start) != comparison(window=3).digest(start)
        assert made.digest(start) != comparison(fingerprint="g").digest(start)
        renamed = tuple(Text(text.name + "x", text.ids) for text in TEXTS)
        assert made.digest(end) == comparison(texts=renamed, out=Path("elsewhere")).digest(end)

    def test_every_module_that_is_left_out_of_it_is_there(self):
        package = Path(comparison_module.__file__).parent.parent
        for name in comparison_module.UNINVOLVED:
            assert (package / name).exists()

    def test_another_solver_makes_another_digest(self, monkeypatch):
        cell = Cell(comparison().rows[1])
        before = comparison().digest(cell)
        monkeypatch.setattr(comparison_module, "code", lambda: "other")
        assert comparison().digest(cell) != before

    def test_a_calibration_file_counts_by_what_it_holds(self, tmp_path):
        file = tmp_path / "text.txt"

        def digest():
            recipe = make_recipe(calibration=str(file), format="dense")
            row = Row("eqft", 2, recipe, (0.1,), 2.4)
            return comparison(rows=(row,)).digest(Cell(row))

        file.write_text("one")
        first = digest()
        assert digest() == first
        file.write_text("two")
        assert digest() != first
