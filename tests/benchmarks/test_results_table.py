import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"


@pytest.fixture
def table(monkeypatch):
    """The generator, imported as it runs: with benchmarks/ in front."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import results_table

    yield results_table
    for name in ("results_table", "tables"):
        sys.modules.pop(name, None)


@pytest.fixture
def run(table, monkeypatch):
    """Return a function that runs the generator; it returns what the process would end with."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["results_table.py", *map(str, arguments)])
        try:
            table.main()
        except SystemExit as stop:
            return stop.code
        return 0

    return call


def test_the_documents_say_what_the_results_say(table, run):
    assert {README, ROOT / "docs/study.md", ROOT / "docs/results/start.md"} <= set(table.FILES)
    assert run("--check") == 0


def test_every_result_is_in_a_document_as_a_whole(table):
    marks = [mark for file in table.FILES for mark in table.BLOCK.finditer(file.read_text())]
    whole = [mark["name"] for mark in marks if mark["view"] is None]
    assert sorted(whole) == sorted(file.stem for file in (ROOT / "model_zoo/results").glob("*.json"))


def test_the_figures_in_the_readmes_sentences_are_those_of_the_results():
    readme = " ".join(README.read_text().split())
    rows = json.loads((ROOT / "model_zoo/results/compare-demo.json").read_text())["rows"]
    two_bits = {row["method"]: row for row in rows if row["bits"] == 2}
    above = {name: f"{100 * (row['to_lora']['code'] - 1):.0f} %" for name, row in two_bits.items()}
    assert above["loftq"] == above["qpissa"]
    said = f"EQFT ends {above['eqft']} above 16-bit LoRA, LoftQ and QPiSSA {above['loftq']}, QLoRA {above['qlora']}."
    assert said in readme
    for bits in (3, 4):
        ends = {row["method"]: row["end"]["code"] for row in rows if row["bits"] == bits}
        near = [ends[name] for name in ("eqft", "loftq", "qlora")]
        far = max(one["mean"] for one in near) - min(one["mean"] for one in near)
        assert far < min(one["spread"] for one in near)  # "within one standard deviation of each other"
    runs = json.loads((ROOT / "model_zoo/results/mixed-SmolLM2-135M-self-runs.json").read_text())
    found = {row["ratio"]: row["perplexity"] / runs["full_precision"] for row in runs["results"][0]["rows"]}
    said = f"at 2 bits has {found[0]:.1f} times the perplexity of full precision, at 3 bits {found[1]:.1f} times"
    assert said in readme


def test_the_short_view_of_a_comparison_is_some_of_its_rows_and_columns(table):
    result = json.loads((ROOT / "model_zoo/results/compare-demo.json").read_text())
    (short,), (whole,) = table.VIEWS["short"](result), table.KINDS["compare"](result)
    assert short.title == whole.title
    assert short.header == ["bits", "method", "bits/weight", "start", "end", "end / LoRA's"]
    columns = [whole.header.index(name) for name in ("bits", "method", "bits/weight", "start code", "end code")]
    columns.append(whole.header.index("/ LoRA code"))
    names = {"16-bit LoRA", "eqft", "loftq", "qpissa", "qlora"}
    assert short.rows == [[row[column] for column in columns] for row in whole.rows if row[1] in names]
    assert len(short.rows) == 13


@pytest.mark.parametrize("file", sorted((ROOT / "model_zoo/results").glob("*.json")), ids=lambda file: file.stem)
def test_every_result_can_be_drawn_and_names_no_place(table, file):
    result = json.loads(file.read_text())
    assert {"kind", "command", "versions", "machine", "seeds"} <= result.keys()
    assert not [word for word in ("/home/", "/work/", "/root/", "/tmp/") if word in file.read_text()]
    drawn = table.block(file.stem)
    assert drawn.startswith(f"`{result['command']}`:")
    for one in table.KINDS[result["kind"]](result):
        assert one.rows
        assert {len(row) for row in one.rows} == {len(one.header)}
        assert f"| {' | '.join(one.rows[-1])} |" in drawn


def test_a_marked_block_is_replaced_and_nothing_else(table, run, tmp_path):
    file = tmp_path / "README.md"
    file.write_text("before\n<!-- results:memory -->\nold\n<!-- /results -->\nafter\n")
    assert run("--check", file) == "error: README.md is not what model_zoo/results says; run make results-table"
    assert "old" in file.read_text()
    assert run(file) == 0
    text = file.read_text()
    assert "\n\n<!-- /results -->" in text  # else the mark is a row of the table, for some readers of Markdown
    assert text.startswith("before\n<!-- results:memory -->\n`python benchmarks/memory.py`:\n")
    assert text.endswith("\n<!-- /results -->\nafter\n")
    assert "| gptq | 4 | 4.04 | 1768 | 1768 | 69.4 |" in text
    assert "old" not in text
    assert run("--check", file) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "<!-- results:nothing -->\n<!-- /results -->\n",
            "error: <!-- results:nothing -->: no nothing.json in results",
        ),
        (
            "<!-- results:compare-demo:long -->\n<!-- /results -->\n",
            "error: <!-- results:compare-demo:long -->: no view 'long'; there are short",
        ),
        ("<!-- results:memory -->\nno end\n", "error: a <!-- results:NAME --> has no <!-- /results --> after it"),
    ],
)
def test_marks_that_do_not_fit(run, tmp_path, text, message):
    file = tmp_path / "README.md"
    file.write_text(text)
    assert run(file).startswith(message)
    assert file.read_text() == text


def test_fidelitys_ratios_are_to_loftq_at_the_same_bits_and_rank(table):
    row = {"bits": 2, "rank": 4, "bits_per_weight": 2.5, "weight_error": 0.5, "perplexity": 8.0, "excess_nats": 0.4}
    rows = [{**row, "method": "loftq"}, {**row, "method": "eqft", "weight_error": 0.25, "excess_nats": 0.1}]
    (one,) = table.KINDS["fidelity"]({"model": "m", "full_precision": 4.0, "rows": rows})
    assert one.rows[1] == ["2", "4", "eqft", "2.500", "0.2500", "8.000", "2.0000", "0.1000", "0.500", "0.250"]
    (one,) = table.KINDS["fidelity"]({"model": "m", "full_precision": 4.0, "rows": [{**r, "kl": 0.03} for r in rows]})
    assert (one.header[8], one.rows[1][8:]) == ("KL", ["0.0300", "0.500", "0.250"])


def test_mixed_shows_the_share_of_kl_where_runs_were_loaded_and_compared(table):
    rows = [
        {"ratio": ratio, "allocation": "sensitivity", "perplexity": perplexity, "closed": closed, "kl": kl}
        for ratio, perplexity, closed, kl in ((0, 9.0, 0.0, 0.5), (0.5, 6.0, 0.6, 0.2), (1, 5.0, 1.0, 0.1))
    ]
    result = {"model": "m", "calibration": "self", "full_precision": 4.0, "results": [{"rank": 2, "rows": rows}]}
    (one,) = table.KINDS["mixed"](result)
    assert one.header[-2:] == ["KL", "closed of KL"]
    assert one.rows[1] == ["0.5", "2.5", "sensitivity", "6.000", "0.600", "0.2000", "0.750"]
    for row in rows:
        del row["kl"]
    (one,) = table.KINDS["mixed"](result)
    assert (one.header[-1], one.rows[1][-1]) == ("closed", "0.600")
