"""`qinit snndlft`: train spiking AdaLoRA adapters on the layers that matter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from qinit_cli.eqft import interruptible, typed
from qinit_cli.hush import hush
from qinit_cli.options import OUTPUT_PANEL, takes
from qinit_cli.push import quiet_hub

if TYPE_CHECKING:
    from qinit_cli.draw import Screen

    from qinit.snndlft.course import Moment
    from qinit.snndlft.report import SnnReport

METHOD_PANEL, DATA_PANEL, TRAIN_PANEL = "Adapters and layers", "What to learn from", "Training"
CONFIG = (
    *("target_r", "init_r", "deltaT", "tinit", "tfinal", "layer_wise", "spiking"),
    *("time_steps", "decay", "threshold", "lora_alpha"),
)


def _option(kind: Any, panel: str, text: str, *names: str, **more: Any) -> Any:
    return Annotated[kind, typer.Option(*names, help=text, rich_help_panel=panel, **more)]


@takes(
    *("model", "revision", "token", "trust_remote_code"),
    dataset=_option(
        Path,
        DATA_PANEL,
        "What to learn from: a text file or JSONL for language modelling; with --label a .csv, .tsv or .jsonl file, as "
        "GLUE's tasks have it.",
        metavar="FILE",
    ),
    validation=_option(
        Path | None, DATA_PANEL, "What to measure on.", metavar="FILE", show_default="a tenth of --dataset"
    ),
    label=_option(
        str | None, DATA_PANEL, "The column with the class. Left out: language modelling.", metavar="COLUMN",
        show_default=False,
    ),
    columns=_option(
        str | None, DATA_PANEL, "The column of text, or two: sentence1,sentence2.", metavar="COLUMN[,COLUMN]",
        show_default="text",
    ),
    metric=_option(str | None, DATA_PANEL, "accuracy, f1 or matthews, for classes.", show_default="accuracy"),
    length=_option(
        int | None, DATA_PANEL, "Tokens in each example, at most.", min=2, show_default="128, or what the model takes"
    ),
    layer_wise=_option(
        str | None, METHOD_PANEL, "Which layers train on: single (the best), half (the better half) or all.",
        show_default="half",
    ),
    spiking=_option(
        bool | None, METHOD_PANEL, "Spikes between Q and P; without, and with all layers, plain AdaLoRA.",
        "--spiking/--no-spiking", show_default="spiking",
    ),
    target_r=_option(int | None, METHOD_PANEL, "Mean rank at the end.", show_default="8"),
    init_r=_option(int | None, METHOD_PANEL, "Rank at the start.", show_default="12"),
    deltaT=_option(
        int | None, METHOD_PANEL, "Steps between two choices of ranks and layers.", "--deltaT", show_default="1"
    ),
    tinit=_option(int | None, METHOD_PANEL, "Steps before the first choice.", show_default="0"),
    tfinal=_option(int | None, METHOD_PANEL, "Steps after the last choice.", show_default="0"),
    time_steps=_option(int | None, METHOD_PANEL, "Time steps of the neurons.", show_default="4"),
    decay=_option(float | None, METHOD_PANEL, "What a neuron keeps from step to step.", show_default="0.9"),
    threshold=_option(float | None, METHOD_PANEL, "The potential above which it fires.", show_default="1.0"),
    lora_alpha=_option(int | None, METHOD_PANEL, "The branch is scaled by this / --init-r.", show_default="32"),
    target_modules=_option(
        str | None, METHOD_PANEL, "all-linear, names like q_proj,v_proj, or a regular expression.",
        show_default="PEFT's choice for AdaLoRA",
    ),
    steps=_option(int | None, TRAIN_PANEL, "Steps of the optimizer.", min=1, show_default="500"),
    batch_size=_option(int | None, TRAIN_PANEL, "Examples in each step.", min=1, show_default="16"),
    learning_rate=_option(float | None, TRAIN_PANEL, "The largest one.", show_default="1e-3"),
    seed=_option(int | None, TRAIN_PANEL, "Draws the start and the order.", min=0, max=2**32 - 1, show_default="0"),
    save_dir=_option(
        Path | None, OUTPUT_PANEL, "Where the run's directory is made.", show_default="model_zoo/snndlft"
    ),
    out=_option(Path | None, OUTPUT_PANEL, "The run's directory itself, not a name under --save-dir."),
    overwrite=_option(bool, OUTPUT_PANEL, "Replace an earlier run's directory.", "--overwrite"),
    device=_option(str | None, TRAIN_PANEL, "auto, cpu, cuda or cuda:N.", show_default="auto"),
    json_output=_option(bool, OUTPUT_PANEL, "The report as JSON on stdout, all else on stderr.", "--json"),
    quiet=_option(bool, OUTPUT_PANEL, "No progress, no table.", "--quiet"),
    debug=_option(bool, OUTPUT_PANEL, "Show tracebacks.", "--debug"),
)  # fmt: skip
def snndlft(**options: Any) -> None:
    """Train spiking AdaLoRA adapters, on the layers that matter alone, on a 16-bit or a quantized base.

    A run that was killed goes on with the same command. Needs `pip install "qinit[snn]"`; --no-spiking does not.
    """
    from qinit_cli.draw import Screen

    screen = Screen(quiet=options["quiet"], to_stderr=options["json_output"])
    hush()
    from qinit.errors import RecipeError
    from qinit.evaluate.subject import find_model
    from qinit.snndlft.config import make_config
    from qinit.snndlft.place import kept
    from qinit.snndlft.tasks import Data
    from qinit.snndlft.training import Asked, run
    from qinit.source.demo import DEMO_NAME

    quiet_hub(options["quiet"], options["debug"])
    targets = options["target_modules"]
    listed = tuple(targets.split(",")) if targets and "," in targets else targets
    config = make_config(**{name: options[name] for name in CONFIG}, target_modules=listed)
    columns = tuple(name for name in (options["columns"] or "text").split(",") if name)
    if len(columns) > (2 if options["label"] else 1) or not columns:
        raise RecipeError(f"--columns: one column of text, or with --label two, found {options['columns']}")
    if options["metric"] and not options["label"]:
        raise RecipeError("--metric: is about classes; language modelling has perplexity. Give --label too")
    rate = options["learning_rate"]
    if rate is not None and not 0 < rate < 100:
        raise RecipeError(f"--learning-rate: expected a number above 0, found {rate}")
    name = options["model"] or DEMO_NAME
    if options["model"] is None:
        screen.say("No MODEL given: using the embedded demo model.")
    data = Data(
        options["dataset"],
        options["validation"],
        columns if options["label"] else tuple(each for each in columns if options["columns"]),
        options["label"],
        options["metric"] or "accuracy",
        options["length"] or 128,
        options["seed"] or 0,
    )
    given = {
        key: options[key] for key in ("steps", "batch_size", "learning_rate", "device") if options[key] is not None
    }
    base = find_model(name, options["revision"], options["token"])
    local = name == DEMO_NAME or Path(name).is_dir()
    asked = Asked(
        name, base, data, config,
        trust_remote_code=options["trust_remote_code"], hub=None if local else (name, options["revision"]), **given,
    )  # fmt: skip
    kind = "-".join(["spiking"] * config.spiking + [config.layer_wise])
    short = Path(name).resolve().name if Path(name).is_dir() else name.rsplit("/", 1)[-1]
    out = options["out"] or (options["save_dir"] or Path("model_zoo") / "snndlft") / f"{short}-{kind}"
    with interruptible(out, kept), screen.progress(count=True) as bar:
        task = bar.add_task("starting", total=asked.steps)

        def shown(moment: Moment) -> None:
            bar.update(task, completed=moment.step, description=_words(moment))
            if bar.disable:
                screen.say(f"step {moment.step}: {_words(moment)}")

        report = run(
            asked, out, overwrite=options["overwrite"], command=typed(sys.argv[1:]), say=screen.say, progress=shown
        )
    _show(screen, report, out)
    if options["json_output"]:
        sys.stdout.write(report.to_json())


def _words(moment: Moment) -> str:
    words = f"loss {moment.loss:.4f}, {len(moment.trained)} of {len(moment.ranks)} layers train, "
    words += f"{sum(moment.ranks.values())} triplets"
    if moment.rates:
        words += f", spike rate {sum(moment.rates.values()) / len(moment.rates):.3f}"
    return words


def _show(screen: Screen, report: SnnReport, out: Path) -> None:
    from qinit.snndlft.page import heading, summary

    screen.say(heading(report))
    screen.table("", "", rows=[[key, value] for key, value in {**summary(report), "written to": str(out)}.items()])
    for note in report.notes:
        screen.say(f"note: {note}")
    screen.say(f'Load it: qinit.snndlft.load("{out}")')
