"""A comparison that is made up, and what its cells have found."""

from pathlib import Path

import numpy as np

from qinit.compare.comparison import LORA, Cell, Comparison, Row
from qinit.compare.table import rows
from qinit.compare.texts import Text
from qinit.recipe import make_recipe
from qinit.train.finetune import Training

TEXTS = (Text("one | two", np.arange(8)), Text("other", np.arange(9)))


def comparison(**changes):
    recipe = make_recipe(method="loftq", format="dense", calibration="none")
    table = (
        Row(LORA, 16, None, (0.1, 0.2), 16.0),
        Row("loftq", 2, recipe, (0.1, 0.2), 2.5),
        Row("loftq", 3, recipe, (0.1, 0.2), 3.5),
    )
    values = {"model": "m", "directory": Path("m"), "out": Path("out"), "rows": table, "texts": TEXTS, "window": 4}
    values |= {
        "training": Training(5),
        "learn": Text("t", np.arange(90)),
        "validation": Text("t, its end", np.arange(9)),
    }
    values |= {"seeds": (0, 1, 2), "device": "cpu", "fingerprint": "f"}
    return Comparison(**{**values, **changes})


def found_for(made):
    """Return results of every cell: an end is 10 and the row's number, the seed and ten times the rate more."""
    found = {}
    for number, row in enumerate(made.rows):
        found[Cell(row)] = {"perplexities": [20.0 + number, 30.0], "weight_error": number / 10}
        for rate in row.rates:
            for seed in made.seeds:
                value = 10 + number + seed + 10 * rate
                found[Cell(row, rate, seed)] = {"validation": value + 1, "perplexities": [value, 2 * value]}
    return found


def result_of(made, found):
    texts = [{"name": text.name, "tokens": len(text.ids)} for text in made.texts]
    value = {"model": "m", "rank": 4, "window": 4, "training": {"steps": 5, "batch": 8, "length": 128}}
    value |= {"learn": {"name": "t"}, "seeds": list(made.seeds), "texts": texts, "rows": rows(made, found)}
    value |= {"command": "qinit compare <m>", "validation_tokens": 9, "versions": {"qinit": "1"}}
    return value | {"machine": {"cpu": "c", "cores": 2, "gpu": None}}
