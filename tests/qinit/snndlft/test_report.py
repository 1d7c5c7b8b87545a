import json

import pytest

from qinit.errors import ReportError
from qinit.report.report import Report
from qinit.snndlft.report import SnnReport
from tests.qinit.snndlft.test_page import report


@pytest.fixture
def place(tmp_path):
    (tmp_path / "qinit.json").write_text(report().to_json())
    return tmp_path


def test_what_was_written_is_read(place):
    assert SnnReport.read(place) == report()


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("kind",), "merge", "kind: Input should be 'snndlft'"),
        (("totals", "ranks"), "many", "totals.ranks is not there"),
        (("config",), {}, "config.spiking is not there"),
        (("moments",), [], "moments: Tuple should have at least 1 item"),
        (("moments", 0, "ranks"), {"h.0": 3}, "a layer of moments is not there"),
    ],
)
def test_a_report_that_is_damaged_is_one_line(place, path, value, words):
    raw = json.loads((place / "qinit.json").read_text())
    part = raw
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    (place / "qinit.json").write_text(json.dumps(raw))
    with pytest.raises(ReportError, match="not the report of a training") as error:
        SnnReport.read(place)
    assert words in str(error.value)


def test_who_looks_for_a_run_is_told_what_it_is(place):
    (place / "adapter_config.json").write_text('{"peft_type": "ADALORA"}')
    with pytest.raises(
        ReportError, match=r"is what `qinit snndlft` trained, not a run: an AdaLoRA adapter, which stock"
    ):
        Report.read(place)
