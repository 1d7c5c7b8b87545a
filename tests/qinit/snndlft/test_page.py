import json
import re
import sys

import pytest

from qinit.errors import ReportError
from qinit.snndlft.course import Moment
from qinit.snndlft.page import page, summary
from qinit.snndlft.report import LayerRow, SnnReport


def report(**totals):
    names = ("h.0", "<h.1>")
    moments = [
        Moment(step, 2.0 - step, (names[step - 1],), {"h.0": 3, "<h.1>": step}, 7, 5, {"h.0": 0.125}, 64)
        for step in (1, 2)
    ]
    values = {"metric": "f1", "before": 0.5, "after": 0.75, "layers": 2, "layers_trained": 1, "modules": 2, "ranks": 5}
    values |= {"trainable": 7, "trainable_in_use": 5, "trainable_all_layers": 14, "optimizer_bytes": 64, "head": 0}
    values |= {"seconds_per_step": 0.1, "peak_memory_bytes": 10**6, **totals}
    rows = tuple(LayerRow(name, 1, 3, 1, 0.125) for name in names)
    config, training = {"spiking": True, "layer_wise": "single", "time_steps": 4}, {"steps": 2, "data": {}}
    return SnnReport(
        "snndlft", "<tiny>", "qinit snndlft", config, training, None, values,
        rows, tuple(moments), ("a note",), {}, {},
    )  # fmt: skip


def test_the_page_shows_ranks_layers_and_spikes_over_time():
    pytest.importorskip("plotly")
    text = page(report(spike_rate=0.125, energy_per_token={"spiking": 1e-9, "dense": 2e-9}))
    assert "<title>&lt;tiny&gt;: spiking AdaLoRA, layer-wise single</title>" in text
    assert "0.5000 before, 0.7500 after 2 steps" in text
    assert "1.0 nJ a token for the adapters, 2.0 nJ without spikes" in text
    assert re.findall(r'<div id="(\w+)"', text) == ["ranks", "trained", "rates", "loss"]
    assert "<h.1>" not in text
    assert json.dumps([[3, 3], [1, 2]]).replace(" ", "") in text.replace(" ", "")


def test_what_there_is_not_is_left_out(monkeypatch):
    assert not {"head", "spike rate"} & set(summary(report()))
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ReportError, match="need plotly"):
        page(report())
