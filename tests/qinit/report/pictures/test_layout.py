import math
from itertools import pairwise

import pytest

from qinit.report.pictures import layout
from qinit.report.pictures.contents import Grid
from qinit.report.pictures.layout import (
    bits_title,
    numbers_shown,
    spans_of,
    steep,
    thinned,
    width_labels,
    width_matrix,
    width_range,
)
from tests.qinit.report.reports import row

BLOCKS = Grid(tuple(row(f"l.{n}.{kind}", bits) for n, bits in enumerate((2, None, 8)) for kind in ("a", "b")))
EXPERTS = Grid(tuple(row(f"l.0.experts.{e}.w1", 2 + 2 * e) for e in range(2)))


def test_the_title_of_the_widths_says_what_the_cells_do_not_show():
    assert bits_title(Grid((row("l.0.a"), row("l.1.a")))) == "Bits by layer and module type"
    assert bits_title(BLOCKS).endswith("; grey: kept as it was")
    assert bits_title(EXPERTS).endswith("; mean where a cell holds several layers")


def test_widths_are_drawn_by_their_logarithm_and_kept_layers_apart():
    missing = math.nan
    assert width_matrix(BLOCKS, kept=False)[0] == pytest.approx([1.0, missing, 3.0], nan_ok=True)
    assert width_matrix(BLOCKS, kept=True)[0] == pytest.approx([missing, 0.0, missing], nan_ok=True)
    assert width_matrix(EXPERTS, kept=False) == [[math.log2(3)]]
    assert width_labels(BLOCKS) == [["2", "", "8"]] * 2
    assert width_labels(EXPERTS) == [["3"]]


def test_a_cell_that_no_layer_has_is_drawn_as_neither():
    grid = Grid((row("l.0.a"), row("l.1.b")))
    for kept in (False, True):
        assert math.isnan(width_matrix(grid, kept=kept)[0][1])
    assert width_labels(grid) == [["2", ""], ["", "2"]]


def test_the_colours_cover_the_usual_widths_and_others_that_there_are():
    assert width_range(BLOCKS) == (1.0, 3.0)
    assert width_range(Grid((row("l.0.a", 16),))) == (1.0, 4.0)


def test_module_types_lie_side_by_side_with_space_between_and_without_those_that_nothing_was_measured_of():
    rows = [row(f"l.{n}.{kind}", None if kind == "b" else 2) for n in range(30) for kind in "abc"]
    assert spans_of(Grid(tuple(rows)), "error") == [("a", 0), ("c", 30 + 2)]
    assert spans_of(Grid(tuple(rows)), "output_error") == []


def test_names_that_do_not_fit_side_by_side_are_steep():
    assert not steep([("mlp.up_proj", 0), ("mlp.down_proj", 3)])
    assert steep([(f"self_attn.some_projection_{n}", 3 * n) for n in range(10)])


@pytest.mark.parametrize("count", [1, 2, 26, 27, 100, 400, 1001])
def test_of_many_numbers_some_are_written_a_round_step_apart(count):
    shown = thinned(count)
    assert shown[0] == 0
    assert len(shown) <= 26
    assert shown == list(range(count)) if count <= 26 else len(shown) >= 26 / 3
    steps = {later - earlier for earlier, later in pairwise(shown)}
    assert steps <= {1, 2, 5, 10, 20, 50}
    assert len(steps) <= 1


def test_the_column_without_a_number_is_always_written_and_never_crowded():
    numbered = Grid(tuple(row(f"h.{n}.fc") for n in range(50)))
    assert numbers_shown(numbered) == thinned(50)
    for count in (27, 50, 51, 52, 59):
        grid = Grid((*(row(f"h.{n}.fc") for n in range(count)), row("lm_head")))
        shown = numbers_shown(grid)
        assert shown[-1] == count
        assert 2 * (shown[-1] - shown[-2]) >= shown[1] - shown[0]


def test_dots_shrink_and_gaps_close_where_there_are_many_layers():
    few, many = (Grid(tuple(row(f"h.{n}.fc") for n in range(count))) for count in (100, layout.CROWDED + 1))
    assert layout.marker_size(few) > layout.marker_size(many) > 0
    assert (layout.cell_gap(few), layout.cell_gap(many)) == (1, 0)
