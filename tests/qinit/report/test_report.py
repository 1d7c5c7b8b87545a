import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qinit.errors import ReportError
from qinit.report.pictures.contents import Grid, heading, pareto_front, summary
from qinit.report.report import REPORT_NAME, Report
from tests.fuzz import changed, changes, examples, file_of, json_values, only_qinit_errors, with_value
from tests.qinit.report.reports import sized


def test_the_report_is_json_with_every_part(tmp_path):
    report = Report(
        "m", "qinit eqft m", {"bits": 2}, {"class": "C"}, {"torch": "2"}, {"layers": 1}, ("n",), (sized((3, 2), 0.5),)
    )
    report.write(tmp_path)
    value = json.loads((tmp_path / REPORT_NAME).read_text())
    assert value.keys() == {"model", "command", "recipe", "source", "versions", "totals", "notes", "layers"}
    assert value["layers"][0] | {"name": "x", "shape": [3, 2], "error": 0.5} == value["layers"][0]


def test_what_was_written_is_read_back(tmp_path):
    rows = (sized((3, 2), 0.5), replace(sized((3, 2), None, kept="odd"), bits=None, group_size=None))
    report = Report("m", "qinit eqft m", {"bits": 2}, {}, {"torch": "2"}, {"layers": 1, "later": [1]}, ("n",), rows)
    report.write(tmp_path)
    assert Report.read(tmp_path) == report


def test_keys_of_a_later_version_are_passed_over(tmp_path):
    report = Report("m", "c", {}, {}, {}, {}, (), (sized((3, 2), 0.5),))
    value = json.loads(report.to_json())
    value["later"] = value["layers"][0]["later"] = 1
    (tmp_path / REPORT_NAME).write_text(json.dumps(value))
    assert Report.read(tmp_path) == report


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", r"qinit\.json: not JSON \(EOF .*\); run `qinit eqft` again"),
        (b"\xff\xfe", r"qinit\.json: not JSON"),
        ("[]", r"not a report of qinit \(the whole: .*\); pass the directory that `qinit eqft` wrote"),
        ("{}", r"not a report of qinit \(model: Field required\)"),
        (("layers", []), r"not a report of qinit \(it has no layers\)"),
        (("layers", [{"name": "x"}]), r"not a report of qinit \(layers\.0\.shape: Field required\)"),
        (("totals", "many"), r"not a report of qinit \(totals: "),
    ],
)
def test_what_is_no_report_is_refused(tmp_path, text, words):
    if isinstance(text, tuple):
        report = Report("m", "c", {}, {}, {}, {}, (), (sized((3, 2), 0.5),))
        text = json.dumps(json.loads(report.to_json()) | {text[0]: text[1]})
    (tmp_path / REPORT_NAME).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ReportError, match=words):
        Report.read(tmp_path)


def test_a_missing_report_says_what_is_missing(tmp_path):
    with pytest.raises(ReportError, match=r"gone: no such directory; pass the directory that `qinit eqft` wrote"):
        Report.read(tmp_path / "gone")
    with pytest.raises(ReportError, match=r"qinit\.json: no such file; pass"):
        Report.read(tmp_path)
    (tmp_path / REPORT_NAME).mkdir()
    with pytest.raises(ReportError, match=r"qinit\.json: cannot be read \(Is a directory\)"):
        Report.read(tmp_path)


FULL = Report(
    "m",
    "c",
    {"method": "eqft", "rank": 4, "format": "dense"},
    {"class": "C"},
    {},
    {
        **{"bits_per_weight": 2.5, "grid_bits_per_weight": 2.25},
        "allocation": {
            **{"allocation": "sensitivity", "metric": "x", "chosen": [2.5, 1.0]},
            **{"front": [[2.0, 3.0], [3.0, 0.5]], "uniform": [[2.0, 3.0]]},
        },
        "evaluations": [{"text": "t", "perplexity": 3.5, "reference_perplexity": 3.0}],
    },
    ("n",),
    (sized((3, 2), 0.5), replace(sized((3, 2), None, kept="odd"), bits=None, group_size=None)),
)


def put_into_words(raw):
    """Read a report and put it into words, as `qinit report` does before it draws."""
    with file_of(raw, REPORT_NAME) as file, only_qinit_errors():
        report = Report.read(file.parent)
        assert all(isinstance(word, str) for word in summary(report).values())
        assert heading(report)
        assert Grid(report.layers).kinds
        pareto_front(report)
        json.dumps(report.totals)


@examples(30)
@given(st.binary(max_size=40) | st.builds(changed, st.just(FULL.to_json().encode()), changes))
def test_fuzz_bytes_are_a_report_or_refused(raw):
    put_into_words(raw)


@examples(60)
@given(st.integers(0, 10**7), json_values)
def test_fuzz_a_report_with_a_value_replaced_is_read_or_refused(path, value):
    put_into_words(json.dumps(with_value(json.loads(FULL.to_json()), path, value)).encode())
