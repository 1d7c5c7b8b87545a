"""From options to a comparison: everything is checked before the first weight is read."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qinit.compare.comparison import CEILINGS, CELLS, FULL, LORA, Comparison, Row, fingerprint
from qinit.compare.finished import finished_row
from qinit.compare.stored import bits_as_stored
from qinit.compare.texts import Text, split
from qinit.errors import CompareError, OutputError, RecipeError, did_you_mean
from qinit.evaluate.text import length_for
from qinit.grids import GRIDS
from qinit.machine import pick_device
from qinit.planner.make import make_plan
from qinit.recipe import NAMED_TEXTS, SELF, Recipe, make_recipe
from qinit.solver.methods import CALIBRATED, METHODS, STARTS, get_method
from qinit.source.checkpoint import Checkpoint
from qinit.source.vocabulary import Facts
from qinit.train.finetune import Training

RESULT_NAME = "compare.json"
FULL_WIDTH = 16  # bits: a method that rounds has none, a start has
METHODS_DEFAULT = ("eqft", "eqft:none", "loftq", "qpissa", "qlora")


def make_comparison(
    checkpoint: Checkpoint,
    model: str,
    out: Path,
    *,
    methods: Sequence[str],
    bits: Sequence[float],
    options: dict[str, Any],
    runs: Sequence[Path] = (),
    texts: Sequence[Text],
    window: int,
    training: Training | None = None,
    learn: Text | None = None,
    ceilings: Sequence[str] = CEILINGS,
    rates: Sequence[float] = (),
    full_rates: Sequence[float] = (),
    seeds: Sequence[int] = (0,),
    windows: int | None = None,
    keep_runs: bool = False,
) -> Comparison:
    """Check everything and return the comparison. A method is a name of the method table, or `NAME:SOURCE@QUALITY`
    with a calibration or a quality of its own; `options` are a recipe's; `runs` are directories of finished runs, each
    a row; at most `windows` windows of each text are measured.

    Raises CompareError for what does not fit, RecipeError for a method, a width or an option that there is not, and
    what `finished_row` does.
    """
    _check_numbers(training, rates, full_rates, seeds)
    texts = _checked_texts(checkpoint, texts, window, windows)
    validation = None
    if training is not None:
        learn, validation = _checked_learning(checkpoint, learn, training)
    rows = _ceilings(ceilings, rates, full_rates) if training else [Row(FULL, 16, None, (), 16.0)]
    for width in bits:
        for method in methods:
            if width == FULL_WIDTH and not _at_full_width(method, bits, ceilings if training else ()):
                continue
            recipe = _recipe(method, width, options, checkpoint.directory)
            plan = make_plan(recipe, checkpoint.directory, model, None if recipe.base is None else checkpoint.directory)
            rows.append(Row(method, width, plan.recipe, tuple(rates), bits_as_stored(plan)))
    trusted = bool(options.get("trust_remote_code"))
    rows += [finished_row(run, checkpoint, rates, trusted) for run in runs]
    names = [row.name for row in rows]
    device = options.get("device") or "auto"
    if len(set(names)) < len(names):
        widths = ", ".join(map(str, bits))
        given = "; ".join(filter(None, (", ".join(methods), widths, ", ".join(run.name for run in runs))))
        raise CompareError(f"--methods, --bits{', --run' * bool(runs)}: some are given twice ({given})")
    return Comparison(
        model=model,
        directory=checkpoint.directory,
        out=out,
        rows=tuple(rows),
        texts=tuple(texts),
        window=window,
        training=training,
        learn=learn,
        validation=validation,
        seeds=tuple(seeds),
        device=device if ":" in device else pick_device(device).type,  # of several processes each has its own
        fingerprint=fingerprint(checkpoint),
        keep_runs=keep_runs,
    )


def check_place(comparison: Comparison, overwrite: bool) -> None:
    """Raise OutputError if the comparison's directory holds something else; with `overwrite` an earlier comparison's
    cells are removed, so that nothing of it is reused."""
    out, file = comparison.out, comparison.out / RESULT_NAME
    elsewhere = "choose another place with --out"
    try:
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out}: exists and is no directory; {elsewhere}")
        if not out.exists() or not any(out.iterdir()):
            return
        if not file.is_file():
            raise OutputError(f"{out}: exists and has no {RESULT_NAME}, so qinit compare did not write it; {elsewhere}")
        if overwrite:
            shutil.rmtree(out / CELLS, ignore_errors=True)
            return
        found = json.loads(file.read_text(encoding="utf-8"))
        theirs = found["fingerprint"], found["model"]
    except OSError as error:
        raise OutputError(f"{out}: cannot be looked at ({error.strerror}); {elsewhere}") from None
    except (ValueError, KeyError, TypeError):
        raise OutputError(f"{file}: not what qinit compare writes; {elsewhere}, or pass --overwrite") from None
    if theirs[0] != comparison.fingerprint:
        raise OutputError(
            f"{out}: holds a comparison of another model ({theirs[1]}); {elsewhere}, or pass --overwrite to replace it"
        )


def _check_numbers(
    training: Training | None, rates: Sequence[float], full_rates: Sequence[float], seeds: Sequence[int]
) -> None:
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise CompareError(
            f"--seeds: expected different numbers from 0 up, found {', '.join(map(str, seeds)) or 'none'}"
        )
    if training is None:
        return
    for option, values in (("--learning-rates", rates), ("--full-learning-rates", full_rates)):
        wrong = [value for value in values if not (math.isfinite(value) and value > 0)]
        if wrong or not values or len(set(values)) < len(values):
            found = ", ".join(f"{value:g}" for value in values) or "none"
            raise CompareError(f"{option}: expected different positive numbers, found {found}")
    for option, value in (
        ("--finetune", training.steps),
        ("--batch", training.batch),
        ("--micro-batch", 1 if training.micro_batch is None else training.micro_batch),
    ):
        if value < 1:
            raise CompareError(f"{option}: expected 1 or more, found {value}")


def _checked_texts(checkpoint: Checkpoint, texts: Sequence[Text], window: int, windows: int | None) -> list[Text]:
    _check_length(checkpoint, "--length", window)
    if windows is not None and windows < 1:
        raise CompareError(f"--windows: expected 1 or more, found {windows}")
    names = [text.name for text in texts]
    if len(set(names)) < len(names):
        raise CompareError(f"--text: two texts have the same name ({', '.join(names)}); rename one of the files")
    for text in texts:
        if len(text.ids) < window:
            raise CompareError(
                f"{text.name}: has {len(text.ids)} tokens, fewer than one window of {window}; "
                "give more text, or a shorter --length"
            )
    return [Text(text.name, text.ids[: windows and windows * window]) for text in texts]


def _checked_learning(checkpoint: Checkpoint, learn: Text | None, training: Training) -> tuple[Text, Text]:
    """Return what is trained on and what learning rates are chosen by."""
    if learn is None:
        raise CompareError("--finetune: needs a text to train on; give --train-text FILE (or a data set's id)")
    _check_length(checkpoint, "--train-length", training.length)
    part, validation = split(learn)
    needed = training.batch * training.length
    if len(part.ids) < needed or len(validation.ids) < training.length:
        raise CompareError(
            f"{learn.name}: has {len(learn.ids)} tokens to train on, a tenth of them kept for validation; expected "
            f"{training.batch} windows of {training.length} and one for validation; give more text, or a smaller "
            "--batch or --train-length"
        )
    return part, validation


def _check_length(checkpoint: Checkpoint, option: str, length: int) -> None:
    if length < 2:
        raise CompareError(f"{option}: expected 2 tokens or more, found {length}")
    facts = Facts.read(checkpoint.directory, checkpoint.config)
    if not facts.causal:
        raise CompareError(f"{checkpoint.directory}: is no causal language model ({facts.architecture})")
    if facts.clip(length) < length:
        raise CompareError(f"{option}: the model takes {facts.positions} tokens, found {length}")


def default_length(checkpoint: Checkpoint) -> int:
    """Return the length of a window that `qinit eval` takes too: 2048 tokens, or what the model takes if less."""
    return length_for(checkpoint.directory, Facts.read(checkpoint.directory, checkpoint.config), None)


def _ceilings(names: Sequence[str], rates: Sequence[float], full_rates: Sequence[float]) -> list[Row]:
    for name in names:
        if name not in CEILINGS:
            raise CompareError(f"--ceilings: no '{name}'{did_you_mean(name, CEILINGS)}; known are lora and full")
    return [Row(name, 16, None, tuple(rates if name == LORA else full_rates), 16.0) for name in names]


def _at_full_width(method: str, bits: Sequence[float], ceilings: Sequence[str]) -> bool:
    """Whether a method has a row at 16 bits: a start has, if it is no ceiling. Raises CompareError for one that rounds
    where no other width is given."""
    if method.partition(":")[0] in STARTS:
        return method not in ceilings
    if set(bits) == {FULL_WIDTH}:
        raise CompareError(f"--bits: 16 is for {', '.join(STARTS)}; {method} rounds, so give it fewer too")
    return False


def _recipe(method: str, bits: float, options: dict[str, Any], directory: Path) -> Recipe:
    """Return a method's recipe; it gets the calibration options only if it can use them."""
    named, _, quality = method.partition("@")
    name, _, source = named.partition(":")
    try:
        row = get_method(name)
    except RecipeError as error:
        raise RecipeError(f"--methods:{str(error).removeprefix('method:')}") from None
    values = {key: value for key, value in options.items() if value is not None}
    if quality:
        values["quality"] = quality
    if source:
        values["calibration"] = source
    elif not row.needs and name not in CALIBRATED:
        values["calibration"] = "none"
    elif row.needs and values.get("calibration", "auto") == "auto":
        values["calibration"] = SELF
    dropped = set()
    if values.get("calibration") == "none":
        dropped = {"text_field", "rounding", "act_order", "polish"}
    elif values.get("calibration", "auto") in ("auto", *NAMED_TEXTS):
        dropped = {"text_field"}
    if not row.adjustable:
        dropped |= {"rounding", "act_order"}
    values = {key: value for key, value in values.items() if key not in dropped}
    if row.grid != "int":
        values["format"] = "dense"  # no packed format holds it
    if name in STARTS:
        values.pop("polish", None)
        if bits == FULL_WIDTH and row.start == "none":
            values["base"] = str(directory)
            values.pop("group_size", None)
    values["check"] = False  # a comparison measures on its own text
    return make_recipe(**{"format": "dense", **values, "method": name, **_widths(name, bits)})


def _widths(method: str, bits: float) -> dict[str, Any]:
    """Return the recipe's options for a width: one for all layers, or the two of the grid's that it lies between."""
    row = get_method(method)
    offered = GRIDS[row.grid].bits
    if row.mixes_widths and bits not in offered and min(offered) < bits < max(offered):
        low, high = max(width for width in offered if width < bits), min(width for width in offered if width > bits)
        return {"ratio": (bits - low) / (high - low), "bits_low": low, "bits_high": high}
    if isinstance(bits, int):
        return {"bits": bits}
    mixing = {name: GRIDS[other.grid].bits for name, other in METHODS.items() if other.mixes_widths}
    alone = " and ".join(f"{name} alone has, between {min(has)} and {max(has)} bits" for name, has in mixing.items())
    raise CompareError(
        f"--bits: {bits:g} is a mix of two widths, which {alone}; found {method}, give it whole widths (another --out "
        "keeps another table)"
    )
