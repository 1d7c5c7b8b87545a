"""What a run has come to: measured at its end against the original, on text that calibration has not seen."""

from __future__ import annotations

import time
from collections.abc import Generator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qinit.errors import CalibrationError, QinitError
from qinit.evaluate.figures import Figures
from qinit.evaluate.job import Block, Loading, Read, Way, choose_way, in_memory, streamed
from qinit.evaluate.saved import row_of
from qinit.evaluate.subject import Subject
from qinit.evaluate.text import Text, Tokens, tokenize
from qinit.evaluate.windows import Windows, cut_windows
from qinit.events import Checking, Event
from qinit.plan.limits import CHECK_WINDOW
from qinit.plan.plan import Plan
from qinit.planner.nominal import check_tokens
from qinit.recipe import RANDOM, Recipe
from qinit.runner.job import Job
from qinit.solver.methods import CALIBRATED
from qinit.stream.calls import NotStreamable
from qinit.text.bundled import check_documents
from qinit.text.sources import load_samples

TEXT = "text that qinit brings, none of it for calibration"
BROKEN = 1.0  # nats of KL per token: beyond it little of what the original predicts is left
MORE_BITS = {2: 3, 3: 4, 4: 8}
# The last two are torch's own, where a model cannot take the text; memory that is used up is the first of them.
FAILED = (QinitError, NotStreamable, RuntimeError, IndexError)


def check(job: Job) -> Generator[Event, None, dict[str, Any] | None]:
    """Measure what was written beside the original; return the row for the report's totals, None where the recipe asks
    for no check or none can be made, which a note then says. It changes nothing of what was written."""
    plan = job.plan
    if not plan.recipe.check:
        return None
    if not plan.facts.causal:
        yield job.note("check: left out, as the model predicts no next token")
        return None
    started = time.perf_counter()
    try:
        text, tokens, windows = _windows(plan)
        way, figures = yield from _figures(job, windows)
        alone = None if plan.given is None or plan.on_source else (yield from _figures(job, windows, adapter=False))[1]
    except FAILED as error:
        yield job.note(f"check: left out ({_reason(job, error)})")
        return None
    row = row_of(text, tokens, windows, way, figures, _short(plan.model_name))
    if alone is not None:
        row["base_alone"] = {"perplexity": alone.perplexity, "kl": alone.kl, "top1_agreement": alone.agreement}
    warning = broken_note(row, plan.recipe)
    if warning is not None:
        yield job.note(warning)
    return {**row, "seconds": round(time.perf_counter() - started, 3)}


def _windows(plan: Plan) -> tuple[Text, Tokens, Windows]:
    """Return what is measured on: the same for all runs of a model that take as many tokens; random tokens for a model
    without a tokenizer."""
    facts, checkpoint, recipe = plan.facts, plan.checkpoint, plan.recipe
    length = facts.clip(CHECK_WINDOW)
    count = max(1, check_tokens(plan) // length)
    text = Text(TEXT, "\n\n".join(check_documents()), "documents joined with blank lines")
    try:
        tokens = tokenize(text, checkpoint.directory, facts, trust_remote_code=recipe.trust_remote_code)
    except CalibrationError:
        seed = (recipe.seed + 1) % 2**63  # those of `--calibration random` are others
        directory, config = checkpoint.directory, checkpoint.config
        drawn = load_samples(RANDOM, directory, config, samples=count, length=length, seed=seed)
        ids = drawn.tokens.flatten()
        text = Text("random tokens, as there is no tokenizer", "", f"drawn with seed {seed}")
        tokens = Tokens(ids, "no special tokens")
    return text, tokens, cut_windows(tokens.ids, length, limit=count)


def _figures(job: Job, windows: Windows, *, adapter: bool = True) -> Generator[Event, None, tuple[Way, Figures]]:
    """Measure block by block, whatever memory is free, so that the figures are the same everywhere; else in memory;
    with the `adapter` or the base alone."""
    plan, trusted = job.plan, job.plan.recipe.trust_remote_code
    name, run = _short(plan.model_name), job.place.run
    base = run if plan.given is None else plan.given.checkpoint.directory
    place = plan.adapter_directory(run) if adapter and plan.adapter_specs else None
    written = Subject("the run" if adapter else "the base alone", base, place, trust_remote_code=trusted)
    original = Subject(name, plan.checkpoint.directory, trust_remote_code=trusted)
    try:
        way = Way(True, "as every check", "float32", batch_size=1)  # a run's memory is bounded by its blocks
        with TemporaryDirectory(dir=job.place.scratch) as directory:
            figures = yield from _told(streamed(written, original, windows, way, job.device, Path(directory)))
    except NotStreamable as reason:
        way = choose_way(written, original, windows, job.device, batch_size=1)
        if way.streamed:
            raise NotStreamable(f"{reason}, and in memory not either: {way.reason}") from None
        figures = yield from _told(in_memory(written, original, windows, way, job.device))
    return way, figures


def _told(events: Generator[Any, None, Figures]) -> Generator[Event, None, Figures]:
    """Pass on what an evaluation tells as a run tells it."""
    while True:
        try:
            event = next(events)
        except StopIteration as end:
            return end.value
        match event:
            case Loading(model):
                yield Checking(f"loading {model}", 0, 1)
            case Block(model, done, blocks):
                yield Checking(f"{model}, block by block", done, blocks)
            case Read(done, windows):
                yield Checking("comparing predictions", done, windows)


def broken_note(row: dict[str, Any], recipe: Recipe) -> str | None:
    """Return the warning for a start that is broken, with what was not done yet; None for one that is not."""
    if row["kl"] <= BROKEN:
        return None
    figures = f"KL {row['kl']:.2f} nats per token, the same top token for {100 * row['top1_agreement']:.0f} %"
    *first, last = _remedies(recipe)
    return (
        f"check: this start is broken, its predictions are far from the original's ({figures}); to start closer: "
        f"{', '.join(first)} or {last}"
    )


def _remedies(recipe: Recipe) -> list[str]:
    """Say what would bring a start closer, the most effective first."""
    found = []
    if recipe.method not in CALIBRATED and not recipe.calibrated:
        found.append("take method eqft and calibrate (--calibration text)")
    elif recipe.calibration in ("none", RANDOM):
        found.append("calibrate (--calibration self or text)")
    else:
        found.append("calibrate on more text (--calibration-samples, --calibration-budget)")
    if recipe.mixed:
        found.append("give more bits (--ratio or --target-bits)")
    elif recipe.base is None and recipe.bits in MORE_BITS:
        found.append(f"give more bits (--bits {MORE_BITS[recipe.bits]})")
    if not recipe.polish:
        found.append("polish (--polish 100)")
    return [*found, f"take a higher rank (--rank {2 * recipe.rank})"]


def _reason(job: Job, error: BaseException) -> str:
    """Say what went wrong, on one line and without this machine's directories."""
    text = " ".join(str(error).split())
    for place, name in ((job.place.run, "the run"), (job.plan.checkpoint.directory, "the model")):
        text = text.replace(str(place), name)
    return text


def _short(model: str) -> str:
    """Name a model without the directories that it lies in: a card tells nobody's."""
    return Path(model).resolve().name if Path(model).is_dir() else model
