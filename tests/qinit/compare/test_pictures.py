from qinit.compare.comparison import FULL, LORA, Row
from qinit.compare.pictures import page, panels, png
from qinit.compare.table import header
from tests.qinit.compare.comparisons import comparison, found_for, result_of


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
