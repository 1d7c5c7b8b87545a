"""The report against itself."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qinit.recipe import make_recipe
from qinit.report.report import LayerRow, Report
from qinit.verification.figures import check_rows, check_totals
from tests.helpers import edit_json
from tests.qinit.verification.runs import vouched

NAME = "model.layers.0.self_attn.q_proj"


def row(**values):
    return lambda report: report["layers"][0].update(values)


def total(**values):
    return lambda report: report["totals"].update(values)


CHECK = {"text": "a", "tokens": 9, "kl": 0.5, "top1_agreement": 0.5, "perplexity": 9.0, "reference_perplexity": 8.0}
CASES = {
    "bits": (row(bits=4), f"{NAME}: bits: expected 3, found 4"),
    "group size": (row(group_size=64), f"{NAME}: group_size: expected 32, found 64"),
    "rank": (row(rank=5), f"{NAME}: rank: expected 4, found 5"),
    "shape": (row(shape=[64, 65]), f"config.json: {NAME}: shape: expected [64, 65], found (64, 64)"),
    "no error": (row(error=None), f"{NAME}: error: expected a number, found nothing"),
    "kept": (row(kept="why"), f"{NAME}: bits: expected nothing, as the layer was kept, found 3"),
    "bytes": (row(bytes_after=7), f"{NAME}: bytes_after: expected "),
    "twice": (row(name="model.layers.1.self_attn.q_proj"), "model.layers.1.self_attn.q_proj has more than one row"),
    "a layer that is not in the model": (row(name="x"), "config.json: x: shape: expected [64, 64], found nothing"),
    "the mean": (total(error=0.5), "totals: error, made anew from the rows: expected "),
    "the start": (total(error_start="0.5"), "totals: error_start, made anew from the rows: expected "),
    "the count": (total(layers=3), "totals: layers, made anew from the rows: expected 14, found 3"),
    "the size": (total(adapter_bytes=1), "totals: adapter_bytes, made anew from the rows: expected "),
    "the width": (total(bits_per_weight=2), "totals: bits_per_weight, made anew from the rows: expected "),
    "a check that is none": (total(check=[1]), "totals: check: expected an object, found [1]"),
    "a check without figures": (
        total(check={"text": "a"}),
        "totals: check.kl: expected a number from 0 up, found nothing",
    ),
    "a share above one": (
        total(check={**CHECK, "top1_agreement": 1.5}),
        "totals: check.top1_agreement: expected a number from 0 up to 1, found 1.5",
    ),
    "a check of nothing": (
        total(check={**CHECK, "text": None}),
        "totals: check.text: expected the text's name, found no",
    ),
    "the recipe": (lambda report: report["recipe"].update(bits=5), "bits: method eqft offers 2, 3, 4 or 8, found 5"),
    "no report": (lambda report: report.pop("layers"), "qinit.json: not a report of qinit"),
}


@pytest.mark.parametrize(("change", "expected"), CASES.values(), ids=CASES)
def test_a_report_that_contradicts_itself_or_the_model_is_named(change, expected, copy_of):
    _, run = copy_of("gptq")
    edit_json(run / "qinit.json", change)
    found = vouched(run)
    assert any(expected in line for line in found), found


def test_a_check_that_a_run_can_have_and_none_are_fine(copy_of):
    _, run = copy_of("gptq")
    assert not vouched(run)
    edit_json(run / "qinit.json", total(check=CHECK))
    assert not vouched(run)


def test_a_report_of_another_run_with_outputs_measured_is_checked_for_them_too(copy_of):
    _, run = copy_of("dense")
    edit_json(run / "qinit.json", lambda report: report["totals"].update(output_error=1.5))
    found = vouched(run)
    assert len(found) == 1, found
    assert found[0].startswith("qinit.json: totals: output_error, made anew from the rows: expected ")


def test_ranks_that_were_chosen_under_a_budget_may_differ():
    fields = ("m", (8, 16), 2, 16, 3, 256, 10, 0.5, 0.25, (), 0.1)
    report = Report("m", "", {}, {}, {}, {}, (), (LayerRow(*fields),))
    recipe = make_recipe(ratio=0.5, rank_budget="1MB", rank=4)
    assert not list(check_rows(report, recipe))
    worse = replace(report, layers=(replace(report.layers[0], rank=9),))
    assert [str(each) for each in check_rows(worse, recipe)] == ["qinit.json: m: rank: expected 1 to 8, found 9"]
    for field, value, found in (
        ("shape", (0, 16), "shape: expected two counts, found (0, 16)"),
        ("error", 1e300, "error: expected a finite size, found 1e+300"),
    ):
        worse = replace(report, layers=(replace(report.layers[0], **{field: value}),))
        assert f"qinit.json: m: {found}" in [str(each) for each in check_rows(worse, recipe)]
    assert "totals: layers" in json.dumps([str(each) for each in check_totals(report, recipe)])
