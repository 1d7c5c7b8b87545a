"""Sensitivity files and reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from qinit.report.report import LayerRow, Report
from tests.cli.hostile.world import World, add, at, device, fifo, folder, loop, sparse, text


def sensitivity(content: bytes) -> Callable[[World], object]:
    return text("s.json", content)


def measured(layers: bytes) -> Callable[[World], object]:
    return sensitivity(b'{"signature":{"group_size":64},"how":"x","layers":' + layers + b"}")


NONE_OF_QINIT = "s.json is no sensitivity.json of qinit"


MEQFT = ("meqft", "{model}", "--out", "out", "--ratio", "0.5", "--sensitivity", "s.json")


for name, damage, says in (
    ("no JSON", sensitivity(b"{"), NONE_OF_QINIT),
    ("a list", sensitivity(b"[]"), NONE_OF_QINIT),
    ("nothing in it", sensitivity(b"{}"), NONE_OF_QINIT),
    ("deep nesting", sensitivity(b"[" * 100_000), "nested too deeply"),
    ("NaN", measured(b'{"a":{"2x4":NaN}}'), "nan is no number of nats"),
    ("minus one", measured(b'{"a":{"2x4":-1}}'), "-1 is no number of nats"),
    ("400 digits", measured(b'{"a":{"2x4":1' + b"0" * 400 + b"}}"), "OverflowError"),
    ("true", measured(b'{"a":{"2x4":true}}'), "True is no number of nats"),
    ("no width", measured(b'{"a":{"x":1}}'), NONE_OF_QINIT),
    ("signature as pairs", sensitivity(b'{"signature":[[1,2]],"how":"x","layers":{}}'), NONE_OF_QINIT),
    ("layers as a list", measured(b"[1]"), NONE_OF_QINIT),
    ("a layer twice", measured(b'{"a":{},"a":{}}'), "'a' stands there twice"),
    ("of another model", measured(b"{}"), "was measured for another model (None, now"),
    ("5 million values", measured(b"[" + b"1," * 5_000_000 + b"1]"), "more than 4000000 values"),
    ("1 GB", sparse("s.json", 10**9), "s.json cannot be read (has 1000.0 MB, at most 67.1 MB are read)"),
    ("pipe", at("s.json", fifo), "s.json cannot be read (not a regular file)"),
    ("endless device", at("s.json", device), "s.json cannot be read (not a regular file)"),
    ("folder", at("s.json", folder), "s.json cannot be read (Is a directory)"),
):
    add(f"sensitivity: {name}", says, damage, ("plan", *MEQFT[1:]), MEQFT)


def report(content: bytes) -> Callable[[World], object]:
    return text("qinit.json", content)


def rows(*changes: dict[str, Any], **totals: Any) -> Callable[[World], object]:
    """A good report but for these changes to its rows, and these totals."""
    good = LayerRow("model.layers.0.q_proj", (8, 16), 2, 64, 4, 9, 9, 0.5, 0.25, (), 0.1)
    values = json.loads(Report("m", "c", {"method": "eqft"}, {}, {}, totals, (), (good,)).to_json())
    values["layers"] = [{**values["layers"][0], **change} for change in changes or ({},)]
    return report(json.dumps(values).encode())


FRONT = {"allocation": "sensitivity", "metric": "x", "chosen": [2.5, 1.0]}


NO_REPORT = "not a report of qinit"


for name, damage, says in (
    ("no JSON", report(b"{"), "qinit.json: not JSON"),
    ("a list", report(b"[]"), NO_REPORT),
    ("deep nesting", report(b"[" * 100_000), "qinit.json: not JSON"),
    ("not UTF-8", report(b'"\xff"'), "qinit.json: not JSON"),
    ("no layers", report(b"{}"), NO_REPORT),
    ("error of NaN", rows({"error": float("nan")}), f"{NO_REPORT} (layers.0.error: "),
    ("error of 1e300", rows({"error": 1e300}), f"{NO_REPORT} (layers.0.error: "),
    ("error below 0", rows({"error": -1.0}), f"{NO_REPORT} (layers.0.error: "),
    ("shape of 0", rows({"shape": [0, 0]}), f"{NO_REPORT} (layers.0.shape.0: "),
    ("shape of 10^400", rows({"shape": [10**400, 1]}), NO_REPORT),
    ("bits of 0", rows({"bits": 0}), f"{NO_REPORT} (layers.0.bits: "),
    ("bits of 10^9", rows({"bits": 10**9}), f"{NO_REPORT} (layers.0.bits: "),
    ("a number as name", rows({"name": 5}), f"{NO_REPORT} (layers.0.name: "),
    ("bits per weight as text", rows(bits_per_weight="2"), "totals.bits_per_weight is '2'"),
    ("bits per weight of 10^400", rows(bits_per_weight=10**400), "totals.bits_per_weight is 1000"),
    ("allocation is a list", rows(allocation=[1]), "totals.allocation of the report is not what qinit writes"),
    ("front of NaN", rows(allocation={**FRONT, "front": [[2, float("nan")]]}), "totals.allocation of the report"),
    ("front of 10^400", rows(allocation={**FRONT, "front": [[2, 10**400]]}), "totals.allocation of the report"),
    ("evaluations without text", rows(evaluations=[{}]), "totals.evaluations of the report is not what qinit writes"),
    ("perplexity of -1", rows(evaluations=[{"text": "t", "perplexity": -1, "reference_perplexity": 2}]), "evaluations"),
    ("400 x 400 cells", rows(*({"name": f"l.{n}.k{n}"} for n in range(400))), "400 module types and 400 layer numbers"),
    ("1 GB", sparse("qinit.json", 10**9), "has 1000.0 MB, at most 67.1 MB are read"),
    ("pipe", at("qinit.json", fifo), "qinit.json: cannot be read (not a regular file)"),
    ("endless device", at("qinit.json", device), "qinit.json: cannot be read (not a regular file)"),
    ("link to itself", at("qinit.json", loop), "qinit.json: cannot be read (Too many levels of symbolic links)"),
):
    add(f"report: {name}", says, damage, ("report", ".", "--out", "drawn"))
