import json
import math
from dataclasses import replace

import pytest

from qinit.report import REPORT_NAME, LayerRow, Report, peak_memory_bytes, relative_error, versions


def row(shape, error, kept=None):
    return LayerRow("x", shape, 2, 64, 4, 100, 20, error, error, (), 0.1, kept)


def test_the_relative_error_weighs_layers_by_their_size():
    rows = (row((3, 10), 0.4), row((1, 10), 0.8))
    assert math.isclose(relative_error(rows, "error"), math.sqrt((3 * 0.16 + 1 * 0.64) / 4))


def test_kept_layers_do_not_count():
    assert relative_error((row((3, 10), 0.4), row((9, 9), None, kept="odd")), "error") == pytest.approx(0.4)


def test_what_was_not_measured_does_not_count():
    rows = (row((3, 10), 0.4), replace(row((9, 9), 0.6), output_error=0.2), replace(row((2, 9), 0.6), output_error=0.5))
    expected = math.sqrt((81 * 0.2**2 + 18 * 0.5**2) / 99)
    assert relative_error(rows, "output_error") == pytest.approx(expected)


def test_the_report_is_json_with_every_part(tmp_path):
    report = Report(
        "m", "qinit eqft m", {"bits": 2}, {"class": "C"}, {"torch": "2"}, {"layers": 1}, ("n",), (row((3, 2), 0.5),)
    )
    report.write(tmp_path)
    value = json.loads((tmp_path / REPORT_NAME).read_text())
    assert value.keys() == {"model", "command", "recipe", "source", "versions", "totals", "notes", "layers"}
    assert value["layers"][0] | {"name": "x", "shape": [3, 2], "error": 0.5} == value["layers"][0]


def test_versions_name_what_can_change_a_byte():
    import torch

    found = versions()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(found) >= {"python", "qinit", "numpy", "numba", "transformers", "peft"}


def test_peak_memory_is_in_bytes():
    before = peak_memory_bytes()
    block = bytearray(200 << 20)
    block[::4096] = b"x" * len(block[::4096])
    assert peak_memory_bytes() >= max(before, 200 << 20)
