import json
import math
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qinit.errors import OutputError, ReportError
from qinit.report.pictures.contents import NO_FRONT, Grid, bits_words, heading, pareto_front, summary
from qinit.report.pictures.files import write_pictures
from qinit.report.pictures.html import page
from qinit.report.pictures.raster import png
from qinit.report.report import LayerRow, Report

CHROMIUM = next(filter(None, map(shutil.which, ("/usr/bin/chromium", "chromium", "google-chrome"))), None)
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
TYPES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
ALLOCATION = {
    "allocation": "sensitivity",
    "metric": "second-order loss",
    "front": [[2.5, 0.5], [2.9, 0.2], [4.4, 0.02]],
    "chosen": [2.9, 0.2],
    "uniform": [[2.4, 0.7], [3.4, 0.2], [4.4, 0.03]],
}
EVALUATIONS = [
    {"text": "held out", "perplexity": 15.0, "reference_perplexity": 12.0, "tokens": 9},
    {"text": "alone", "perplexity": 14.0, "reference_perplexity": None},
]
EVIL = "<script>document.title='owned'</script></script><img src=http://127.0.0.1/x onerror=document.title='owned'>$a_$"


def row(name, bits=2, error=0.2, shape=(8, 16), output=None):
    kept = "7 inputs" if bits is None else None
    start, end = (None, None) if kept else (2 * error, error)
    before = None if output is None else 3 * output
    return LayerRow(name, shape, bits, 64, 4, 100, 20, start, end, (), 0.1, kept, before, output)


def report(rows=None, model="org/model", **totals):
    if rows is None:
        rows = [
            row(f"model.layers.{n}.{kind}", 2 + (n + m) % 3, 0.1 + 0.02 * n)
            for n in range(4)
            for m, kind in enumerate(TYPES)
        ]
    recipe = {"method": "eqft", "bits": 2, "rank": 4}
    return Report(model, f"qinit eqft {model}", recipe, {}, {}, {"bits_per_weight": 2.9, **totals}, (), tuple(rows))


def picture_size(data):
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])


class Page(HTMLParser):
    """What a page shows: its title, its tags, and what they load."""

    def __init__(self, text):
        super().__init__()
        self.title, self.tags, self.loads, self.text = "", [], [], ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = tag
        wanted = ("src", "href", "xlink:href", "data", "srcset", "action")
        self.loads += [value for name, value in attributes if name in wanted and value]

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "title":
            self.title += data
        elif self._inside not in ("script", "style"):
            self.text += data

    def count(self, word):
        return sum(word in (attributes.get("class") or "").split() for _, attributes in self.tags)


SHAPES = {
    "allocated": report(allocation=ALLOCATION, evaluations=EVALUATIONS),
    "with outputs": report([row(f"h.{n}.fc", output=0.1) for n in range(3)]),
    "one layer": report([row("model.layers.0.fc")]),
    "no numbers": report([row(name) for name in ("fc1", "fc2", "a" * 300)]),
    "head": report([*(row(f"h.{n}.fc", 3) for n in range(27)), row("lm_head", 8)]),
    "some kept": report([row("h.0.a"), row("h.1.a", None), row("h.0.b", None)]),
    "all kept": report([row("h.0.a", None), row("h.1.a", None)]),
    "experts": report([row(f"l.{n}.experts.{e}.w1", 2 + e % 2) for n in range(3) for e in range(4)]),
    "not finite": report([row("h.0.a", error=math.nan), row("h.1.a", error=math.inf), row("h.2.a")]),
    "no gain": report(allocation={**ALLOCATION, "chosen": [2.9, -0.01], "uniform": []}),
    "hostile": report([row(f"h.0.{EVIL}"), row("\\frac{$")], EVIL, allocation={**ALLOCATION, "metric": EVIL}),
    "other script": report(model="模型/한국"),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.filterwarnings("error")
def test_any_report_can_be_drawn(shape):
    width, height = picture_size(png(SHAPES[shape]))
    assert width > 1000
    assert height > 200
    found = Page(page(SHAPES[shape]))
    assert found.title == heading(SHAPES[shape])
    assert found.loads == ["data:,"]


def test_400_layers_fit_on_a_picture_of_the_usual_size():
    deep = report([row(f"model.layers.{n}.{kind}", 2 + n % 2) for n in range(400) for kind in TYPES])
    assert picture_size(png(deep)) == picture_size(png(report()))
    assert len(page(deep)) < 8e6


def test_many_module_types_make_a_long_picture_not_an_endless_one():
    assert picture_size(png(report([row(f"layer_{n}") for n in range(1000)])))[1] < 2**14


def test_the_same_report_gives_the_same_bytes():
    assert png(report(allocation=ALLOCATION)) == png(report(allocation=ALLOCATION))
    assert page(report(allocation=ALLOCATION)) == page(report(allocation=ALLOCATION))


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


def test_without_allocation_there_is_no_front_and_a_line_says_so():
    assert pareto_front(report()) is None
    text = page(report())
    assert f"<p>{NO_FRONT}.</p>" in text
    assert 'id="pareto"' not in text
    assert picture_size(png(report()))[1] < picture_size(png(report(allocation=ALLOCATION)))[1]


@pytest.mark.parametrize(
    ("totals", "key"),
    [
        ({"allocation": {**ALLOCATION, "chosen": [1]}}, "allocation"),
        ({"allocation": ["odd"]}, "allocation"),
        ({"allocation": {**ALLOCATION, "front": [["a", "b"]]}}, "allocation"),
        ({"evaluations": [{"text": "x"}]}, "evaluations"),
        ({"evaluations": [{"text": "x", "perplexity": -1.0, "reference_perplexity": 2.0}]}, "evaluations"),
    ],
)
def test_totals_that_are_damaged_are_an_error_of_the_report(totals, key):
    with pytest.raises(ReportError, match=rf"totals\.{key} of the report is not what qinit writes .* again"):
        summary(report(**totals))


def test_the_totals_in_words():
    words = summary(report(allocation=ALLOCATION, evaluations=EVALUATIONS))
    assert words["layers"] == "12"
    assert words["bits per weight"] == "2.900 as stored"
    assert words["allocation"] == "sensitivity: 2.900 bits per weight, +0.2000 nats (perplexity x 1.221) predicted"
    assert words["perplexity on held out"] == "15.000, +0.2231 nats (perplexity x 1.25)"
    assert words["perplexity on alone"] == "14.000"


@pytest.mark.parametrize(("package", "draw"), [("matplotlib", png), ("plotly", page)])
def test_without_the_extra_it_says_what_to_install(monkeypatch, package, draw):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ReportError, match=rf'need {package}, .*; pip install "qinit\[report\]"$'):
        draw(report())


def test_importing_the_module_needs_neither_the_extra_nor_torch():
    slow = "{'torch', 'matplotlib', 'plotly'}"
    script = f"import sys, qinit.report.pictures.files; sys.exit(bool({slow} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_both_files_are_written_and_replaced(tmp_path):
    for _ in range(2):
        found = write_pictures(report(), tmp_path / "new/place")
        assert found == (tmp_path / "new/place/report.png", tmp_path / "new/place/report.html")
    assert {path.name for path in (tmp_path / "new/place").iterdir()} == {"report.png", "report.html"}
    assert found[0].read_bytes() == png(report())


def test_a_failed_write_keeps_the_earlier_file_and_leaves_no_other(tmp_path, monkeypatch):
    write_pictures(report(), tmp_path)
    before = (tmp_path / "report.png").read_bytes()
    written = Path.write_bytes

    def full(path, data):
        written(path, data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match=r"cannot be written \(No space left on device: .*report\.png"):
        write_pictures(report(model="other"), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.png", "report.html"}
    assert (tmp_path / "report.png").read_bytes() == before


def test_a_place_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another place with --out"):
        write_pictures(report(), tmp_path / "file")


def opened(path, profile):
    """Open a page in Chromium and return what it then holds."""
    browser = subprocess.run(
        [CHROMIUM, *QUIET, f"--user-data-dir={profile}", "--virtual-time-budget=10000", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Page(browser.stdout)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_chromium_draws_the_charts_and_loads_nothing(tmp_path):
    drawn = report(
        [row(f"h.{n}.{kind}", 2 + n % 3, output=0.1) for n in range(4) for kind in TYPES], allocation=ALLOCATION
    )
    _, path = write_pictures(drawn, tmp_path)
    hover = "Plotly.Fx.hover('bits', {xval: 2, yval: 1})"
    path.write_text(path.read_text().replace("</body>", f"<script>onload = () => {hover}</script></body>"))
    found = opened(path, tmp_path / "profile")
    assert found.title == "org/model: 2.900 bits per weight as stored, rank 4, eqft"
    assert [attributes["id"] for _, attributes in found.tags if "js-plotly-plot" in attributes.get("class", "")] == [
        *("bits", "weight-error", "output-error", "pareto"),
    ]
    assert found.count("hm") == 1
    assert found.count("js-line") == 2 * 2 * len(TYPES) + 1 + 5  # two charts, the front, and the legends' own
    for words in ("self_attn.q_proj", "layer number", "with the adapter", "bits per weight", "this run, predicted"):
        assert words in found.text
    assert "h.2.self_attn.o_proj" in found.text  # what the hover shows
    assert "weight error: 0.4000 base alone, 0.2000 with the adapter" in found.text
    assert all(value.startswith(("data:", "#")) for value in found.loads), found.loads
    assert not any("cloud" in (attributes.get("data-title") or "").lower() for _, attributes in found.tags)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_chromium_runs_nothing_that_a_name_holds(tmp_path):
    kept = json.loads(json.dumps(EVALUATIONS).replace("held out", EVIL))
    hostile = report([row(f"h.0.{EVIL}"), row(EVIL)], EVIL, allocation={**ALLOCATION, "metric": EVIL}, evaluations=kept)
    _, path = write_pictures(hostile, tmp_path)
    found = opened(path, tmp_path / "profile")
    assert found.title == heading(hostile)
    assert found.count("hm") == 1
    assert "img" not in [tag for tag, _ in found.tags]
    assert EVIL in found.text
