"""`qinit eval`: perplexity of a run or a checkpoint, and how close it is to its original."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from qinit_cli.draw_eval import EvalScreen
from qinit_cli.hush import hush
from qinit_cli.options import MODEL_PANEL, OUTPUT_PANEL, RUN_PANEL, takes

if TYPE_CHECKING:
    from qinit.evaluate.subject import Subject
    from qinit.evaluate.text import Text

TEXT_PANEL = "What to measure on"


def _option(kind: Any, panel: str, text: str, *names: str, **more: Any) -> Any:
    return Annotated[kind, typer.Option(*names, help=text, rich_help_panel=panel, **more)]


DIRECTORY = typer.Argument(metavar="DIR", help="A run's directory, a checkpoint's, an adapter's, or a Hub id.")


@takes(
    *("revision", "token", "device", "json_output", "quiet", "debug"),
    directory=Annotated[str | None, DIRECTORY],
    base=_option(str | None, MODEL_PANEL, "A base, without the adapter of a run: a directory or a Hub id."),
    adapter=_option(Path | None, MODEL_PANEL, "An adapter's directory; alone, on the base that it names."),
    reference=_option(
        str | None,
        MODEL_PANEL,
        "The original: its perplexity, KL(original || model) and top-1 agreement too. A directory or a Hub id; demo is "
        "the embedded demo model.",
        metavar="MODEL",
    ),
    repair=_option(bool, MODEL_PANEL, "Write where the base is into an adapter whose base has moved.", "--repair"),
    text=_option(
        Path | None,
        TEXT_PANEL,
        "A text file, or JSONL (one object per line). For a classifier of `qinit snndlft`: labelled rows, with the "
        "columns that it was trained with.",
        metavar="FILE",
    ),
    dataset=_option(
        str | None,
        TEXT_PANEL,
        "Or a data set on the Hub, owner/name:config@split; @test if left out.",
        metavar="HUB_ID",
    ),
    text_field=_option(str | None, TEXT_PANEL, "The field that holds the text.", show_default="text"),
    length=_option(
        int | None, TEXT_PANEL, "Tokens in a window.", show_default="2048, or what the model takes if that is less"
    ),
    stride=_option(
        int | None,
        TEXT_PANEL,
        "Windows overlap and start this many tokens apart, so that each token has length - stride or more before it.",
        show_default="no overlap",
    ),
    windows=_option(int | None, TEXT_PANEL, "Only so many windows, from the start.", show_default="all"),
    tasks=_option(str | None, TEXT_PANEL, "Tasks of lm-evaluation-harness, as arc_easy,piqa.", metavar="A,B"),
    stream=_option(
        str | None,
        RUN_PANEL,
        "always: one block in memory at a time; never: the whole model.",
        show_default="auto: what the free memory allows",
    ),
    dtype=_option(str | None, RUN_PANEL, "float32, bfloat16 or float16.", show_default="float32"),
    batch_size=_option(int | None, RUN_PANEL, "Windows at once.", show_default="by the size of their logits"),
    no_save=_option(bool, OUTPUT_PANEL, "Leave the run's qinit.json and README.md as they are.", "--no-save"),
)  # fmt: skip
def evaluate(**options: Any) -> None:
    """Measure perplexity, and KL and agreement with the original; a run's figures go into its report and card."""
    from qinit.errors import RecipeError

    screen = EvalScreen(quiet=options["quiet"], to_stderr=options["json_output"])
    tasks = [task for task in (options["tasks"] or "").split(",") if task.strip()]
    if options["text"] is not None and options["dataset"] is not None:
        raise RecipeError("--text and --dataset: give one of the two")
    if tasks:
        from qinit.evaluate.tasks import require_harness

        require_harness()
    hush()
    from qinit.evaluate import job, saved
    from qinit.evaluate import subject as subjects
    from qinit.machine import pick_device
    from qinit.report.report import is_training
    from qinit.snndlft.evaluation import own_loader

    token, revision = options["token"], options["revision"]
    device = pick_device(options["device"] or "auto")
    if (
        options["directory"] is not None
        and is_training(Path(options["directory"]))
        and _scored(screen, options, device)
    ):
        return
    subject = own_loader(
        subjects.find_subject(options["directory"], options["base"], options["adapter"], revision, token)
    )
    _explain(screen, subject, options["repair"])
    keep = subject.run if not options["no_save"] else None
    if keep is not None:
        saved.check_savable(keep)
    text = _text(subject, options, tasks)
    reference = None
    if options["reference"] is not None:
        if text is None:
            raise RecipeError("--reference: compares on a text; give --text FILE or --dataset too")
        reference = subjects.Subject(options["reference"], subjects.find_model(options["reference"], None, token))
        job.check_vocabularies(subject, reference)
    tokens, windows = _windows(subject, reference, text, options)
    way = job.choose_way(
        subject, reference, windows, device,
        stream=options["stream"] or "auto", dtype=options["dtype"], batch_size=options["batch_size"], tasks=bool(tasks),
    )  # fmt: skip
    screen.way(way)
    done = screen.follow_evaluation(job.evaluate(subject, reference, windows, way, device, tasks))
    row = None
    if text is not None:
        assert done.figures is not None
        name = None if options["reference"] is None else _short(options["reference"])
        row = saved.row_of(text, tokens, windows, way, done.figures, name)
    written = [] if keep is None else saved.save(keep, row, done.tasks)
    screen.evaluated(subject.name, row, done, [str((keep or subject.base) / name) for name in written])
    if options["json_output"]:
        value = {"model": subject.name, **(row or {}), "tasks": done.tasks, "seconds": done.seconds, "written": written}
        sys.stdout.write(json.dumps(value) + "\n")


def _scored(screen: EvalScreen, options: dict[str, Any], device: Any) -> bool:
    """Measure what `qinit snndlft` trained, if that is a classifier."""
    from qinit.errors import RecipeError
    from qinit.snndlft.evaluation import score
    from qinit.snndlft.report import SnnReport

    directory = Path(options["directory"])
    report = SnnReport.read(directory)
    if report.classes is None:
        return False
    own = {"directory", "text", "token", "device", "json_output", "quiet", "debug", "no_save"}
    if given := [name for name, value in options.items() if value and name not in own]:
        option = "--" + given[0].replace("_", "-")
        raise RecipeError(f"{option}: is about language models, and {directory} is a classifier; leave it out")
    if options["text"] is None:
        data = report.training["data"]
        named = ", ".join([*map(str, data.get("columns") or []), str(data.get("label"))])
        raise RecipeError(f"{directory}: is a classifier; give --text FILE, a .csv, .tsv or .jsonl file with {named}")
    found = score(directory, report, options["text"], device)
    screen.facts(
        str(directory), {found.metric: f"{found.value:.4f}", "text": f"{options['text'].name}, {found.rows} rows"}
    )
    if options["json_output"]:
        value = {"model": str(directory), "metric": found.metric, "value": found.value}
        sys.stdout.write(json.dumps({**value, "text": options["text"].name, "rows": found.rows}) + "\n")
    return True


def _explain(screen: EvalScreen, subject: Subject, repair: bool) -> None:
    """Say what was done about an adapter whose base has moved, and put it right if asked to."""
    from qinit.evaluate.subject import repair_base

    if subject.lost is not None:
        screen.say(
            f"note: {subject.adapter}/adapter_config.json names the base '{subject.lost}', which is not there; taking "
            f"the run that the adapter lies in, {subject.base}"
        )
        if repair:
            repair_base(subject)
            screen.say("note: wrote that into adapter_config.json")
        else:
            screen.say("note: --repair writes that into adapter_config.json, for loaders that follow it")
    if subject.adapter is not None and subject.run is None:
        whose = "a trained one" if subject.loader else "not the one that the run started with"
        screen.say(f"note: the adapter is {whose}, so nothing is written into a report")


def _text(subject: Subject, options: dict[str, Any], tasks: list[str]) -> Text | None:
    """Return the text to measure on, None where there are tasks alone."""
    from qinit.errors import RecipeError
    from qinit.evaluate import text

    length = text.length_for(subject.base, subject.facts, options["length"])
    if options["text"] is not None:
        return text.file_text(options["text"], options["text_field"])
    if options["dataset"] is not None:
        wanted = None if options["windows"] is None else options["windows"] * length
        return text.hub_text(options["dataset"], options["text_field"], options["token"], wanted)
    if tasks:
        return None
    if text.is_demo(subject.base):
        return text.own_text()
    raise RecipeError(
        f"{subject.name}: no text to measure on; give --text FILE or --dataset owner/name:config@split, such as "
        "--dataset Salesforce/wikitext:wikitext-2-raw-v1@test"
    )


def _windows(subject: Subject, reference: Subject | None, text: Text | None, options: dict[str, Any]) -> Any:
    """Return the text's tokens and its windows."""
    from qinit.errors import QinitError
    from qinit.evaluate.text import length_for, require_same_tokens, tokenize
    from qinit.evaluate.windows import cut_windows

    if text is None:
        return None, None
    tokens = tokenize(text, subject.base, subject.facts)
    if reference is not None:
        require_same_tokens(text, tokens, subject.base, reference.base)
    length = length_for(subject.base, subject.facts, options["length"])
    try:
        return tokens, cut_windows(tokens.ids, length, options["stride"], options["windows"])
    except QinitError as error:
        raise QinitError(f"{text.name}: {error}") from None


def _short(model: str) -> str:
    """Name a model without the directories that it lies in: a card tells nobody's."""
    return Path(model).resolve().name if Path(model).is_dir() else model
