import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from qinit.errors import ReportError
from qinit.report.pictures.contents import NO_FRONT, heading, pareto_front
from qinit.report.pictures.files import write_pictures
from qinit.report.pictures.html import page
from tests.qinit.report.reports import ALLOCATION, EVALUATIONS, EVIL, SHAPES, TYPES, report, row

CHROMIUM = next(filter(None, map(shutil.which, ("/usr/bin/chromium", "chromium", "google-chrome"))), None)
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


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


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.filterwarnings("error")
def test_any_report_can_be_drawn(shape):
    found = Page(page(SHAPES[shape]))
    assert found.title == heading(SHAPES[shape])
    assert found.loads == ["data:,"]


def test_400_layers_are_a_page_that_browsers_open():
    deep = report([row(f"model.layers.{n}.{kind}", 2 + n % 2) for n in range(400) for kind in TYPES])
    assert len(page(deep)) < 8e6


def test_the_same_report_gives_the_same_bytes():
    assert page(report(allocation=ALLOCATION)) == page(report(allocation=ALLOCATION))


def test_without_allocation_there_is_no_front_and_a_line_says_so():
    assert pareto_front(report()) is None
    text = page(report())
    assert f"<p>{NO_FRONT}.</p>" in text
    assert 'id="pareto"' not in text


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "plotly"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ReportError, match=r'need plotly, .*; pip install "qinit\[report\]"$'):
        page(report())


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
