import math
from dataclasses import replace

import pytest

from qinit.errors import ReportError
from qinit.report.pictures.contents import Grid, bits_words, heading, pareto_front, summary
from tests.qinit.report.reports import ALLOCATION, CHECK, EVALUATIONS, SHAPES, report, row


def test_the_grid_is_in_model_order_with_unnumbered_layers_last():
    grid = Grid((row("m.10.b"), row("m.10.a"), row("m.2.b"), row("head")))
    assert grid.kinds == ["b", "a", "head"]
    assert grid.columns == ["2", "10", "none"]
    assert [cell.rows[0].name for cell in grid.of_kind("b")] == ["m.2.b", "m.10.b"]


def test_a_layers_experts_share_a_cell():
    grid = Grid(tuple(row(f"l.0.experts.{e}.w1", 2 + e) for e in range(3)))
    (cell,) = grid.cells.values()
    assert (cell.title, cell.bits) == ("3 x experts.*.w1 in layer 0", "2 to 4, mean 3.00")


@pytest.mark.parametrize(
    ("widths", "words"),
    [((2, 2), "2"), ((2, 4, 4), "2 to 4, mean 3.33"), ((3, None), "3 (+ 1 kept)"), ((None,), "kept")],
)
def test_widths_in_words(widths, words):
    assert bits_words([row("x", bits) for bits in widths]) == words


def test_the_front_has_the_predicted_and_the_measured_points():
    front = pareto_front(report(allocation=ALLOCATION, evaluations=EVALUATIONS))
    assert front.front == [(2.5, 0.5), (2.9, 0.2), (4.4, 0.02)]
    assert front.chosen == [(2.9, 0.2)]
    assert front.measured == [(2.9, pytest.approx(math.log(15 / 12)))]  # the other has no reference
    assert [name for name, *_ in front.series] == [
        *("one width for all layers", "Pareto front, predicted", "this run, predicted", "this run, measured"),
    ]
    assert front.log
    assert not pareto_front(SHAPES["no gain"]).log


def test_an_allocation_by_a_rule_has_no_front():
    by_rule = report(allocation={"allocation": "first", "metric": "by a rule"})
    assert pareto_front(by_rule) is None
    assert summary(by_rule)["allocation"] == "first: by a rule"


def test_weights_that_are_not_packed_are_counted_on_the_grid():
    packed = report(grid_bits_per_weight=2.28125)
    assert heading(packed) == "org/model: 2.900 bits per weight as stored, rank 4, eqft"
    assert summary(packed)["bits per weight"] == "2.900 as stored, 2.281 on the grid"
    dense = replace(packed, recipe={**packed.recipe, "format": "dense"})
    assert heading(dense) == "org/model: 2.281 bits per weight on the grid, rank 4, eqft"


@pytest.mark.parametrize(
    ("totals", "key"),
    [
        ({"allocation": {**ALLOCATION, "chosen": [1]}}, "allocation"),
        ({"allocation": ["odd"]}, "allocation"),
        ({"allocation": {**ALLOCATION, "front": [["a", "b"]]}}, "allocation"),
        ({"check": ["odd"]}, "check"),
        ({"check": {**CHECK, "kl": "much"}}, "check"),
        ({"check": {**CHECK, "kl": 10**400}}, "check"),
        ({"check": {"kl": 0.5}}, "check"),
        ({"evaluations": [{"text": "x"}]}, "evaluations"),
        ({"calibration": {"polish": {"steps": 3, "kept": True}}}, "calibration"),
        ({"calibration": {"polish": ["odd"]}}, "calibration"),
        ({"evaluations": [{"text": "x", "perplexity": -1.0, "reference_perplexity": 2.0}]}, "evaluations"),
    ],
)
def test_totals_that_are_damaged_are_an_error_of_the_report(totals, key):
    with pytest.raises(ReportError, match=rf"totals\.{key} of the report is not what qinit writes .* again"):
        summary(report(**totals))


def test_the_totals_in_words():
    words = summary(report(allocation=ALLOCATION, evaluations=EVALUATIONS, check=CHECK))
    assert words["KL from the original"] == "0.5000 nats per token"
    assert words["same top token"] == "75.0 %"
    assert words["layers"] == "12"
    assert words["bits per weight"] == "2.900 as stored"
    assert words["allocation"] == "sensitivity: 2.900 bits per weight, +0.2000 nats (perplexity x 1.221) predicted"
    assert words["perplexity on held out"] == "15.000, +0.2231 nats (perplexity x 1.25)"
    assert words["perplexity on alone"] == "14.000"


def test_every_polish_is_said_with_what_it_read_and_won():
    polish = {"steps": 30, "text": "a", "tokens": 64, "held_out_before": 0.5, "held_out_after": 0.25, "kept": True}
    words = summary(report(calibration={"text": "b", "polish": polish}))
    assert words["calibrated on"] == "b"
    assert words["polish"] == "30 steps on 64 tokens of a; held-out loss 0.5000 -> 0.2500"
    last = {**polish, "kl": {"before": 0.75, "after": 0.5, "tokens": [8, 8]}, "earlier": [{**polish, "kept": False}]}
    words = summary(report(calibration={"polish": last}))
    assert words["polish 1"] == "30 steps on 64 tokens of a; nothing gained"
    assert words["polish 2"].endswith("0.2500; KL from the original 0.7500 -> 0.5000 nats per token")
    assert not {"calibrated on", "polish"} & words.keys()
