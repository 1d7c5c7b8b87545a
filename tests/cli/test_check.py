"""What a user sees of the measurement at a run's end."""

import json
from pathlib import Path

import pytest

from qinit.runner.checked import check
from tests.evaluated import make_source

RUN = ("--rank", 4, "--iter", 1, "--out", "out", "--device", "cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model that predicts with some certainty, with the word tokenizer."""
    return make_source(tmp_path_factory.mktemp("source") / "llama")


@pytest.fixture
def checked(command, monkeypatch):
    """Let runs measure themselves at their end, as they do for users."""
    monkeypatch.setattr("qinit.runner.run.check", check)
    return command


def report():
    return json.loads(Path("out/qinit.json").read_text())


def shown(found):
    """Return the lines of the table that a check gives."""
    return [
        f" KL from the original {found['kl']:.4f} nats per token",
        f" same top token {100 * found['top1_agreement']:.1f} %",
        f" perplexity {found['perplexity']:.3f}, original {found['reference_perplexity']:.3f}",
        f" measured on {found['tokens']} tokens of text that qinit brings, none of it for calibration",
    ]


def lines(text):
    """Return the lines with one space where there are several."""
    return [f" {' '.join(line.split())}" for line in text.splitlines()]


def test_the_table_the_report_the_card_and_the_page_have_the_figures(checked, source):
    code, out, err = checked("eqft", source, *RUN, "--bits", 8)
    assert (code, err) == (0, "")
    found = report()["totals"]["check"]
    assert set(shown(found)) <= set(lines(out))
    assert "note:" not in out
    assert f"| KL from the original | {found['kl']:.4f} nats per token |" in Path("out/README.md").read_text()
    code, out, _ = checked("report", "out")
    assert code == 0
    assert set(shown(found)) <= set(lines(out))
    assert f"{found['kl']:.4f} nats per token" in Path("out/report.html").read_text()
    assert checked("verify", "out")[0] == 0


def test_json_has_them(checked, source):
    code, out, _ = checked("eqft", source, *RUN, "--bits", 8, "--json")
    assert code == 0
    assert json.loads(out)["totals"]["check"] == report()["totals"]["check"]


def test_a_broken_start_is_warned_of_on_the_screen_in_the_report_and_in_the_card(checked, source):
    _, out, _ = checked("eqft", source, *RUN)
    (note,) = report()["notes"]
    assert note.startswith("check: this start is broken")
    assert f"note: {note}\n" in out
    assert f"- {note}\n" in Path("out/README.md").read_text()


def test_it_is_left_out_as_asked_by_the_option_and_by_a_recipe(checked, source):
    _, out, _ = checked("eqft", source, *RUN, "--no-check")
    assert "KL from" not in out
    assert "check" not in report()["totals"]
    Path("recipe.yaml").write_text("check: false\n")
    checked("eqft", source, *RUN, "--recipe", "recipe.yaml", "--overwrite")
    assert report()["recipe"]["check"] is False
    assert "check" not in report()["totals"]
    checked("eqft", source, *RUN, "--recipe", "recipe.yaml", "--check", "--overwrite")
    assert "check" in report()["totals"]


def test_quiet_prints_nothing_but_measures(checked, source):
    assert checked("eqft", source, *RUN, "--quiet") == (0, "", "")
    assert "check" in report()["totals"]


def test_mixed_widths_are_measured_too(checked, source):
    code, out, _ = checked("meqft", source, "--ratio", 0.5, "--allocation", "first", *RUN)
    assert code == 0
    assert set(shown(report()["totals"]["check"])) <= set(lines(out))
