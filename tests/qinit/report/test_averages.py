import math
from dataclasses import replace

import pytest

from qinit.report.averages import average, mean_bits, places, relative_error
from tests.qinit.report.reports import sized


def test_the_relative_error_weighs_layers_by_their_size():
    rows = (sized((3, 10), 0.4), sized((1, 10), 0.8))
    assert math.isclose(relative_error(rows, "error"), math.sqrt((3 * 0.16 + 1 * 0.64) / 4))


def test_kept_layers_do_not_count():
    assert relative_error((sized((3, 10), 0.4), sized((9, 9), None, kept="odd")), "error") == pytest.approx(0.4)


def test_what_was_not_measured_does_not_count():
    rows = (
        sized((3, 10), 0.4),
        replace(sized((9, 9), 0.6), output_error=0.2),
        replace(sized((2, 9), 0.6), output_error=0.5),
    )
    expected = math.sqrt((81 * 0.2**2 + 18 * 0.5**2) / 99)
    assert relative_error(rows, "output_error") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["model.layers.3.mlp.up_proj", "lm_head"], [("mlp.up_proj", 3), ("lm_head", None)]),
        (["l.0.experts.7.w1", "l.1.experts.12.w1"], [("experts.*.w1", 0), ("experts.*.w1", 1)]),
        (["m.encoder.b.0.q", "m.decoder.b.0.q"], [("encoder.b.*.q", 0), ("decoder.b.*.q", 0)]),
        (["net.0", "net.2"], [("net.*", 0), ("net.*", 2)]),
        (["0.x"], [("x", 0)]),
        (["h.9999999999.x"], [("h.9999999999.x", None)]),
        (["fc1", ""], [("fc1", None), ("", None)]),
        ([], []),
    ],
)
def test_module_types_and_layer_numbers(names, found):
    assert places(names) == found


def test_means_of_what_there_is():
    rows = [
        sized((3, 10), 0.4),
        replace(sized((1, 10), None, kept="odd"), bits=None),
        replace(sized((1, 10), 0.4), bits=4),
    ]
    assert mean_bits(rows) == 2.5
    assert mean_bits(rows[1:2]) is None
    assert average(rows, "error") == pytest.approx(0.4)
    assert average(rows, "output_error") is None
