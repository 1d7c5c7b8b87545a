"""An evaluation: how it is done here, and doing it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qinit.errors import FullError, QinitError, RecipeError
from qinit.evaluate.figures import Figures, Logits, logits_of, measure
from qinit.evaluate.loaded import (
    SHARE,
    batch_size_for,
    load_model,
    loaded_bytes,
    logits_bytes,
    missing_packages,
    without_compiler,
)
from qinit.evaluate.streamed import Block, Streamed
from qinit.evaluate.subject import Subject
from qinit.evaluate.tasks import run_tasks
from qinit.evaluate.windows import Windows
from qinit.machine import free_memory, used_up
from qinit.steps import told
from qinit.stream.calls import NotStreamable
from qinit.text.tokens import load_tokenizer

STREAMING = ("auto", "always", "never")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Way:
    """How a model is run: block by block or in memory, why, in which dtype and how many windows at once."""

    streamed: bool
    reason: str
    dtype: str
    batch_size: int


@dataclass(frozen=True)
class Loading:
    """A model is being loaded."""

    model: str


@dataclass(frozen=True)
class Read:
    """`done` of all `windows` have been read and predicted."""

    done: int
    windows: int


@dataclass(frozen=True)
class Tasking:
    """The harness runs these tasks."""

    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Evaluated:
    """The figures (None without windows), each task's metrics, and the seconds that it took."""

    figures: Figures | None
    tasks: dict[str, dict[str, float]]
    seconds: float


Event = Loading | Block | Read | Tasking | Evaluated


def check_vocabularies(subject: Subject, reference: Subject) -> None:
    """Raise QinitError when the two predict over vocabularies of different sizes."""
    sizes = [each.facts.vocabulary for each in (subject, reference)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise QinitError(
            f"{subject.facts.config_file} has vocab_size {sizes[0]}, the reference's {reference.facts.config_file} "
            f"{sizes[1]}; KL and agreement need one vocabulary: give the model that this one was made from"
        )


def choose_way(
    subject: Subject,
    reference: Subject | None,
    windows: Windows | None,
    device: torch.device,
    *,
    stream: str = "auto",
    dtype: str | None = None,
    batch_size: int | None = None,
    tasks: bool = False,
) -> Way:
    """Decide from headers and the free memory how to run. Raises RecipeError for options that do not go together, and
    for `tasks` of a model that is to be streamed."""
    way = _chosen(subject, reference, windows, device, stream, dtype, batch_size)
    if tasks and way.streamed:
        raise RecipeError(
            f"tasks: the harness needs the whole model in memory, and it would be streamed ({way.reason}); use "
            "--stream never"
        )
    return way


def _chosen(
    subject: Subject,
    reference: Subject | None,
    windows: Windows | None,
    device: torch.device,
    stream: str,
    dtype: str | None,
    batch_size: int | None,
) -> Way:
    if stream not in STREAMING:
        raise RecipeError(f"stream: expected {', '.join(STREAMING)}, found '{stream}'")
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f"dtype: expected {', '.join(DTYPES)}, found '{dtype}'")
    if batch_size is not None and batch_size < 1:
        raise RecipeError(f"batch_size: expected 1 or more, found {batch_size}")
    if stream == "always" and dtype not in (None, "float32"):
        raise RecipeError(f"dtype: a streamed evaluation computes in float32, not {dtype}; leave one of the two out")
    models = [subject] if reference is None else [subject, reference]
    vocabulary = max(model.facts.vocabulary or 1 for model in models)
    whole = [model.name for model in models if model.loader is not None]
    if whole and stream == "always":
        raise RecipeError(
            f"stream: the adapter of {whole[0]} is run with the whole model in memory; use --stream never"
        )
    rows = batch_size or (1 if windows is None else batch_size_for(windows, vocabulary))
    wanted = dtype or "float32"
    if stream == "always":
        return Way(True, "as asked", "float32", rows)
    if stream == "never":
        return Way(False, "as asked", wanted, rows)
    if whole:
        return Way(False, "its adapter is loaded by qinit.snndlft alone", wanted, rows)
    missing = [name for model in models for name in missing_packages(model)]
    if missing:
        reason = f"{' and '.join(dict.fromkeys(missing))} not being installed to load packed weights"
        return Way(True, reason, "float32", rows)
    needed = sum(loaded_bytes(model, DTYPES[wanted]) for model in models)
    if windows is not None:
        needed += len(models) * logits_bytes(windows, vocabulary, rows)
    free = free_memory(device)
    reason = f"{needed / 1e9:.2f} GB needed in {wanted}, {free / 1e9:.2f} GB free"
    fits = needed <= SHARE * free
    return Way(not fits, reason, wanted if fits else "float32", rows)


def evaluate(
    subject: Subject,
    reference: Subject | None,
    windows: Windows | None,
    way: Way,
    device: torch.device,
    tasks: Sequence[str] = (),
) -> Generator[Event, None, None]:
    """Run the models over the windows, then the tasks; yields what happens, the last event is Evaluated.

    Streamed hidden states that do not fit in memory go to a temporary directory.
    Raises CheckpointError, RecipeError, FullError where the device has too little memory, and QinitError for NaN or
    Inf.
    """
    try:
        yield from _evaluated(subject, reference, windows, way, device, tasks)
    except torch.OutOfMemoryError:
        less = "--stream always" if way.batch_size == 1 and not way.streamed else "a smaller --batch-size or --length"
        raise FullError(f"{used_up(subject.name, device, way.batch_size)}; use {less}, or --device cpu") from None


def _evaluated(
    subject: Subject,
    reference: Subject | None,
    windows: Windows | None,
    way: Way,
    device: torch.device,
    tasks: Sequence[str],
) -> Generator[Event, None, None]:
    started = time.perf_counter()
    figures, results = None, {}
    if way.streamed:
        assert windows is not None
        try:
            with tempfile.TemporaryDirectory(prefix="qinit-eval-") as directory:
                figures = yield from streamed(subject, reference, windows, way, device, Path(directory))
        except NotStreamable as reason:
            raise RecipeError(
                f"stream: {subject.name} cannot be run block by block ({reason}; {way.reason}); use --stream never"
            ) from None
    else:
        yield Loading(subject.name)
        model = load_model(subject, DTYPES[way.dtype], device)
        with without_compiler():
            if windows is not None:
                figures = yield from _compared(model, reference, windows, way, device)
            if tasks:
                yield Tasking(tuple(tasks))
                results = run_tasks(model, load_tokenizer(subject.base), tasks, way.batch_size)
    yield Evaluated(figures, results, time.perf_counter() - started)


def in_memory(
    subject: Subject, reference: Subject | None, windows: Windows, way: Way, device: torch.device
) -> Generator[Event, None, Figures]:
    """Measure a model, beside a reference if there is one, with both in memory; yields what happens. Raises as
    `evaluate`."""
    yield Loading(subject.name)
    model = load_model(subject, DTYPES[way.dtype], device)
    with without_compiler():
        return (yield from _compared(model, reference, windows, way, device))


def _compared(
    model: Any, reference: Subject | None, windows: Windows, way: Way, device: torch.device
) -> Generator[Event, None, Figures]:
    other = None
    if reference is not None:
        yield Loading(reference.name)
        other = logits_of(load_model(reference, DTYPES[way.dtype], device), windows)
    return (yield from _measured(windows, way, logits_of(model, windows), other))


def streamed(
    subject: Subject, reference: Subject | None, windows: Windows, way: Way, device: torch.device, directory: Path
) -> Generator[Event, None, Figures]:
    """Measure the same block by block; `directory` takes the hidden states that memory does not hold. Raises
    NotStreamable for a model that cannot be run so, and as `evaluate`."""
    subjects = [subject] if reference is None else [subject, reference]
    models = [Streamed(each, windows, way.batch_size, device) for each in subjects]
    for number, model in enumerate(models):
        yield Loading(model.name)
        yield from model.read(directory / str(number), len(models))
    with ExitStack() as heads:
        held: dict[str, torch.nn.Parameter] = {}  # a run's embeddings and head are mostly those of its original
        for model in models:
            held |= heads.enter_context(model.blocks.surroundings(head=True, others=held))
        logits = [model.logits() for model in models]
        return (yield from _measured(windows, way, *logits))


def _measured(
    windows: Windows, way: Way, logits: Logits, reference: Logits | None = None
) -> Generator[Event, None, Figures]:
    steps = measure(windows, way.batch_size, logits, reference)
    return (yield from told(steps, lambda done: Read(done, len(windows))))
