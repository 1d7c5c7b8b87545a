from qinit.compare.comparison import Cell
from qinit.compare.schedule import best_rate, next_cells
from tests.qinit.compare.comparisons import comparison, found_for


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
