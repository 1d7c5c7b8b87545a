"""`qinit compare`: methods side by side on one model, where they start and where the same fine-tuning ends."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from qinit_cli.eqft import typed
from qinit_cli.hush import hush
from qinit_cli.options import CALIBRATING, CHOOSING, OUTPUT_PANEL, QUANTIZING, RUN_PANEL, RUNNING, takes

if TYPE_CHECKING:
    from collections.abc import Callable

    from qinit.compare.comparison import Comparison
    from qinit.compare.texts import Text
    from qinit.processes.group import Processes
    from qinit.source.checkpoint import Checkpoint
    from qinit.train.finetune import Training

COMPARE_PANEL, TUNE_PANEL = "What to compare", "Fine-tuning"


def _option(kind: Any, panel: str, help: str, default: str | bool = False, metavar: str | None = None) -> Any:
    return Annotated[kind | None, typer.Option(help=help, show_default=default, rich_help_panel=panel, metavar=metavar)]


def _flag(panel: str, name: str, help: str) -> Any:
    return Annotated[bool, typer.Option(name, help=help, rich_help_panel=panel)]


COMPARING: dict[str, Any] = {
    "methods": _option(
        *(
            str,
            COMPARE_PANEL,
            "Names of `qinit methods`; NAME:SOURCE gives one a calibration of its own, as eqft:none, and NAME@QUALITY "
            "a quality, as eqft@best.",
        ),
        "eqft,eqft:none,loftq,qpissa,qlora; none with --run",
    ),
    "run": _option(
        *(
            list[Path],
            COMPARE_PANEL,
            "A finished run of the model: a row without a solve. May be given again.",
        ),
        *("none", "DIR"),
    ),
    "bits": _option(
        str, COMPARE_PANEL, "Widths; for eqft also averages, as 2.5: half of the weights get 2, half 3.", "2,3,4"
    ),
    "text": _option(
        *(list[str], COMPARE_PANEL, "A file or a Hub data set to measure on; may be given again."),
        *("the demo model's", "SOURCE"),
    ),
    "length": _option(
        *(int, COMPARE_PANEL, "Tokens in each window of a text; windows do not overlap."),
        "2048, or what the model takes",
    ),
    "windows": _option(int, COMPARE_PANEL, "At most so many windows of each text.", "all"),
    "finetune": _option(int, TUNE_PANEL, "Fine-tune each start by so many steps.", metavar="STEPS"),
    "train_text": _option(
        *(list[str], TUNE_PANEL, "What to train on; its last tenth chooses the learning rate. May be given again."),
        *("the demo model's", "SOURCE"),
    ),
    "train_length": _option(int, TUNE_PANEL, "Tokens in each window.", "128"),
    "batch": _option(int, TUNE_PANEL, "Windows in each step.", "8"),
    "micro_batch": _option(int, TUNE_PANEL, "Windows that go through the model at once.", "the batch"),
    "gradient_checkpointing": _flag(
        TUNE_PANEL, "--gradient-checkpointing", "Compute activations again: less memory, more time."
    ),
    "learning_rates": _option(str, TUNE_PANEL, "Swept for each row, with the first seed.", "1e-4,3e-4,1e-3"),
    "full_learning_rates": _option(str, TUNE_PANEL, "The same for full fine-tuning.", "a tenth of --learning-rates"),
    "seeds": _option(
        str, TUNE_PANEL, "They set the order of the data; all but the first run at the best rate.", "0,1,2"
    ),
    "ceilings": _option(str, TUNE_PANEL, "lora (in 16 bits) and full (all parameters), or none.", "lora,full"),
    "format": _option(str, OUTPUT_PANEL, "What is trained on: dense, or gptq where a method's grid packs.", "dense"),
    "out": _option(Path, OUTPUT_PANEL, "Where the results and the cells go.", "model_zoo/compare/NAME"),
    "overwrite": _flag(OUTPUT_PANEL, "--overwrite", "Begin anew: reuse nothing of an earlier comparison."),
    "keep_runs": _flag(OUTPUT_PANEL, "--keep-runs", "Keep what was quantized; else it goes when its row is done."),
    "jobs": _option(int, RUN_PANEL, "Cells at a time, in processes of their own that share the threads.", "1"),
}
RECIPE = (*QUANTIZING, *CALIBRATING, *CHOOSING)  # options that every method takes alike, as far as they concern it


@takes("model", "revision", "token", "trust_remote_code", *RECIPE, *RUNNING, **COMPARING)
def compare(**options: Any) -> None:
    """Compare methods on one model: bits, where each starts, and where the same fine-tuning ends.

    Finished cells are kept under --out and reused by the next run with the same options. Exit code 1: some cells
    failed; the table says why.
    """
    from qinit.processes.join import joined

    hush()
    with joined() as processes:
        failed = _compared(options, processes)
    if failed:
        raise typer.Exit(1)


def _compared(options: dict[str, Any], processes: Processes) -> bool:
    """Carry out the command, or this process's part of it; returns whether cells have failed."""
    from qinit_cli.draw_compare import Board

    from qinit.compare.make import check_place
    from qinit.compare.schedule import Schedule
    from qinit.errors import CompareError
    from qinit.processes.join import require_device

    board = Board(quiet=options["quiet"], to_stderr=options["json_output"])
    jobs = _or(options["jobs"], 1)
    if jobs < 1:
        raise CompareError(f"--jobs: expected 1 or more, found {jobs}")
    if processes.several and jobs > 1:
        raise CompareError(f"--jobs: each of {processes.count} processes works on one cell at a time; leave it out")
    require_device(options["device"] or "auto")
    comparison = _made(options, board)
    anew = options["overwrite"] and not options["dry_run"]
    processes.from_first(lambda: check_place(comparison, anew), "the place")
    schedule = Schedule(comparison)
    if options["dry_run"]:
        from qinit.compare.forecast import forecast

        planned = forecast(schedule, jobs)
        board.forecast(comparison, planned)
        if options["json_output"]:
            sys.stdout.write(json.dumps(planned) + "\n")
        return False
    from qinit.compare.results import result, write_result
    from qinit.compare.workers import carry_out, set_out
    from qinit.errors import StoppedError

    if processes.several:
        set_out(comparison, processes)
    if not processes.first:
        carry_out(schedule, lambda event: None, processes=processes)
        return False
    # Files by their names alone: the result is for others.
    command = typed([_named(word) for word in sys.argv[1:]])
    write_result(comparison.out, result(comparison, schedule.found, command))
    try:
        with board.progress(schedule) as tell:
            carry_out(schedule, tell, jobs=jobs, prepare=hush, processes=processes)
    except KeyboardInterrupt:
        raise StoppedError(
            f"interrupted; finished cells are kept in {comparison.out}, and the same command goes on"
        ) from None
    final = result(comparison, schedule.found, command)
    places = write_result(comparison.out, final, pictures=True)
    board.result(final, places)
    if options["json_output"]:
        sys.stdout.write(json.dumps(final) + "\n")
    return any(row["failed"] for row in final["rows"])


def _made(options: dict[str, Any], board: Any) -> Comparison:
    """Find the model and the texts, and check that everything fits."""
    from qinit.compare.make import METHODS_DEFAULT, default_length, make_comparison
    from qinit.hub.download import local_directory
    from qinit.source.checkpoint import Checkpoint
    from qinit.source.demo import DEMO_NAME, DEMO_TITLE, demo_directory
    from qinit.train.finetune import Training

    if options["model"] is None:
        board.say(f"No MODEL given: using {DEMO_TITLE}.")
        directory, name = demo_directory(), DEMO_NAME
    else:
        directory = local_directory(options["model"], options["revision"], options["token"])
        local = Path(options["model"]).is_dir()
        name = directory.resolve().name if local else options["model"]
    checkpoint = Checkpoint.open(directory)
    training = None
    if options["finetune"] is not None:
        training = Training(
            steps=options["finetune"],
            length=_or(options["train_length"], 128),
            batch=_or(options["batch"], 8),
            micro_batch=options["micro_batch"],
            checkpointing=options["gradient_checkpointing"],
        )
    window = _or(options["length"], default_length(checkpoint))
    texts, learn = _texts(options, checkpoint, training, window)
    rates = _numbers(options, "learning_rates", float, "1e-4,3e-4,1e-3")
    short = name.rsplit("/", 1)[-1]
    ceilings, runs = _or(options["ceilings"], "lora,full"), options["run"] or []
    return make_comparison(
        checkpoint,
        name,
        options["out"] or Path("model_zoo") / "compare" / short,
        methods=_words(_or(options["methods"], "" if runs else ",".join(METHODS_DEFAULT))),
        bits=_numbers(options, "bits", _width, "2,3,4"),
        options={key: options[key] for key in (*RECIPE, "trust_remote_code", "format", "device")},
        runs=runs,
        texts=texts,
        window=window,
        training=training,
        learn=learn,
        ceilings=[] if ceilings == "none" else _words(ceilings),
        rates=rates,
        full_rates=_numbers(options, "full_learning_rates", float, ",".join(f"{rate / 10:g}" for rate in rates)),
        seeds=_numbers(options, "seeds", int, "0,1,2"),
        windows=options["windows"],
        keep_runs=options["keep_runs"],
    )


def _texts(
    options: dict[str, Any], checkpoint: Checkpoint, training: Training | None, window: int
) -> tuple[list[Text], Text | None]:
    """Read what is measured on and what is trained on; the demo model brings both."""
    from qinit.compare.texts import Text as Tokens
    from qinit.compare.texts import read_source, tokenized
    from qinit.errors import CompareError
    from qinit.evaluate.text import Text
    from qinit.source.demo import held_out_text, new_domain

    def read(sources: list[str], wanted: int) -> list[Any]:
        return [read_source(source, wanted, options["text_field"], options["token"]) for source in sources]

    demo = options["model"] is None
    if not options["text"] and not demo:
        raise CompareError("--text: what to measure on is missing; give --text FILE (or a data set's id)")
    new = new_domain() if demo and training else ("", "")
    if options["text"]:
        texts = read(options["text"], window * _or(options["windows"], 1000))
    else:
        texts = [Text("code", new[1], "one text")] if training else []
        texts.append(Text("docs", held_out_text(), "one text"))
    count, learning = len(texts), []
    if training:
        if options["train_text"]:
            sources = [_training_split(source) for source in options["train_text"]]
            learning = read(sources, training.steps * training.batch * training.length)
        elif demo:
            learning = [Text("code", new[0], "one text")]
    elif options["train_text"]:
        raise CompareError("--train-text: there is nothing to train; give --finetune STEPS")
    found = tokenized(checkpoint, [*texts, *learning])
    return found[:count], Tokens.joined(found[count:]) if learning else None


def _named(word: str) -> str:
    """Return a word of the command as tables repeat it: of a place on this machine the last name."""
    path = Path(word)
    return path.name if "/" in word and (path.is_absolute() or path.exists()) else word


def _training_split(source: str) -> str:
    """Name the split of a data set that names none: to train on it is `train`, where to measure on it is `test`."""
    return source if Path(source).exists() or "@" in source else f"{source}@train"


def _numbers(options: dict[str, Any], name: str, kind: Callable[[str], Any], default: str) -> list[Any]:
    from qinit.errors import CompareError

    given = _or(options[name], default)
    try:
        return [kind(word) for word in _words(given)]
    except ValueError:
        raise CompareError(f"--{name.replace('_', '-')}: expected numbers like {default}, found '{given}'") from None


def _width(word: str) -> float:
    """Read a width, whole ones as whole; raises ValueError."""
    value = float(word)
    if not math.isfinite(value):
        raise ValueError
    return int(value) if value == int(value) else value


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
