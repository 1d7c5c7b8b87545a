"""Reports of every shape, to be averaged and drawn."""

import math

from qinit.report.report import LayerRow, Report

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


CHECK = {
    **{"text": "a text", "tokens": 9, "kl": 0.5, "top1_agreement": 0.75},
    **{"perplexity": 15.0, "reference_perplexity": 12.0},
}


EVIL = "<script>document.title='owned'</script></script><img src=http://127.0.0.1/x onerror=document.title='owned'>$a_$"


def row(name, bits=2, error=0.2, shape=(8, 16), output=None):
    kept = "7 inputs" if bits is None else None
    start, end = (None, None) if kept else (2 * error, error)
    before = None if output is None else 3 * output
    return LayerRow(name, shape, bits, 64, 4, 100, 20, start, end, (), 0.1, kept, before, output)


def sized(shape, error, kept=None):
    """A row of which only the size and the error matter."""
    return LayerRow("x", shape, 2, 64, 4, 100, 20, error, error, (), 0.1, kept)


def report(rows=None, model="org/model", **totals):
    if rows is None:
        rows = [
            row(f"model.layers.{n}.{kind}", 2 + (n + m) % 3, 0.1 + 0.02 * n)
            for n in range(4)
            for m, kind in enumerate(TYPES)
        ]
    recipe = {"method": "eqft", "bits": 2, "rank": 4}
    return Report(model, f"qinit eqft {model}", recipe, {}, {}, {"bits_per_weight": 2.9, **totals}, (), tuple(rows))


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
