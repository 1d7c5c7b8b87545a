"""The options of the commands that quantize or plan, each written down once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args

import typer

MODEL_PANEL, METHOD_PANEL, DATA_PANEL = "What to read", "How to quantize", "Calibration"
BUDGET_PANEL, OUTPUT_PANEL, RUN_PANEL = "Mixed widths", "What to write", "Running"

OPTIONS: dict[str, Any] = {
    "model": Annotated[
        str | None,
        typer.Argument(help="A local directory or a Hub id. Left out: the embedded demo model.", show_default=False),
    ],
    "recipe": Annotated[
        Path | None,
        typer.Option(help="A YAML file with these options by name; flags win over it.", rich_help_panel=MODEL_PANEL),
    ],
    "revision": Annotated[
        str | None, typer.Option(help="Branch, tag or commit on the Hub.", rich_help_panel=MODEL_PANEL)
    ],
    "token": Annotated[
        str | None,
        typer.Option(
            help="Hub token; better HF_TOKEN, which no history keeps. Never printed.", rich_help_panel=MODEL_PANEL
        ),
    ],
    "trust_remote_code": Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Run code that the checkpoint brings (auto_map); it can do anything that you can.",
            rich_help_panel=MODEL_PANEL,
        ),
    ],
    "bits": Annotated[int | None, typer.Option(help="2, 3, 4 or 8.", show_default="2", rich_help_panel=METHOD_PANEL)],
    "rank": Annotated[
        int | None, typer.Option(help="Rank of the adapter.", show_default="16", rich_help_panel=METHOD_PANEL)
    ],
    "iter": Annotated[
        int | None,
        typer.Option(
            "--iter",
            help="Rounds of quantize and fit.",
            show_default="3, without calibration 5",
            rich_help_panel=METHOD_PANEL,
        ),
    ],
    "group_size": Annotated[
        int | None, typer.Option(help="Weights that share a scale.", show_default="64", rich_help_panel=METHOD_PANEL)
    ],
    "symmetric": Annotated[
        bool | None,
        typer.Option(
            "--symmetric",
            help="Zero points in the middle of the grid alone: what formats without zero points hold too.",
            show_default=False,
            rich_help_panel=METHOD_PANEL,
        ),
    ],
    "calibration": Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="What the layers are measured on: a text or JSONL file, self (text that the model writes), text (text "
            "that qinit brings), random (random tokens), the id of a data set on the Hub, or none.",
            show_default="auto: self, or text where that takes too long",
            rich_help_panel=DATA_PANEL,
        ),
    ],
    "calibration_budget": Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="What auto may take at nominal speed: 10m, 90s, 1h, or minutes.",
            show_default="10m",
            rich_help_panel=DATA_PANEL,
        ),
    ],
    "text_field": Annotated[
        str | None,
        typer.Option(help="The field that holds the text.", show_default="text", rich_help_panel=DATA_PANEL),
    ],
    "calibration_samples": Annotated[
        int | None, typer.Option(help="Pieces of text.", show_default="128", rich_help_panel=DATA_PANEL)
    ],
    "calibration_length": Annotated[
        int | None, typer.Option(help="Tokens in each piece.", show_default="512", rich_help_panel=DATA_PANEL)
    ],
    "calibration_mode": Annotated[
        str | None,
        typer.Option(
            help="sequential: later layers make good what earlier ones left; parallel: one pass, each for itself.",
            show_default="sequential",
            rich_help_panel=DATA_PANEL,
        ),
    ],
    "rounding": Annotated[
        str | None,
        typer.Option(help="gptq (error feedback) or nearest.", show_default="gptq", rich_help_panel=DATA_PANEL),
    ],
    "act_order": Annotated[
        bool | None,
        typer.Option(
            "--act-order/--no-act-order",
            help="Round the columns with the largest inputs first.",
            rich_help_panel=DATA_PANEL,
        ),
    ],
    "quality": Annotated[
        str | None,
        typer.Option(
            metavar="WORD",
            help="fast, balanced or best: what calibration and polish may take where nothing else is said.",
            show_default="balanced",
            rich_help_panel=DATA_PANEL,
        ),
    ],
    "polish": Annotated[
        str | None,
        typer.Option(
            metavar="STEPS",
            help="Then train all adapters and scales together towards the full-precision model: a number of steps, or "
            "auto, which goes by the quality and the cost.",
            show_default="auto",
            rich_help_panel=DATA_PANEL,
        ),
    ],
    "target_modules": Annotated[
        str | None,
        typer.Option(
            help="all-linear (of a model that also sees or hears, those of its language part), names like "
            "q_proj,v_proj, or a regular expression for whole names.",
            show_default="all-linear",
            rich_help_panel=METHOD_PANEL,
        ),
    ],
    "exclude": Annotated[
        str | None,
        typer.Option(help="Names (experts) or a regular expression to leave out.", rich_help_panel=METHOD_PANEL),
    ],
    "lora_alpha": Annotated[
        float | None,
        typer.Option("--lora-alpha", "--alpha", show_default="the rank", rich_help_panel=METHOD_PANEL),
    ],
    "use_rslora": Annotated[
        bool | None,
        typer.Option(
            "--use-rslora/--no-use-rslora",
            help="Scale the adapter by lora_alpha / sqrt(rank).",
            rich_help_panel=METHOD_PANEL,
        ),
    ],
    "ratio": Annotated[
        float | None,
        typer.Option(
            help="Share of the weights, 0 to 1, that get the higher of two widths.",
            show_default=False,
            rich_help_panel=BUDGET_PANEL,
        ),
    ],
    "bits_low": Annotated[int | None, typer.Option(show_default="2", rich_help_panel=BUDGET_PANEL)],
    "bits_high": Annotated[int | None, typer.Option(show_default="3", rich_help_panel=BUDGET_PANEL)],
    "target_bits": Annotated[
        float | None,
        typer.Option(
            help="Or the average per quantized weight as stored, scales and zero points counted.",
            show_default=False,
            rich_help_panel=BUDGET_PANEL,
        ),
    ],
    "count_adapter": Annotated[
        bool | None,
        typer.Option(
            "--count-adapter/--no-count-adapter",
            help="Count the adapter in --target-bits: group sizes and ranks are chosen with the widths then.",
            show_default="no-count-adapter",
            rich_help_panel=BUDGET_PANEL,
        ),
    ],
    "target_size": Annotated[
        str | None,
        typer.Option(
            help="Or the size of base and adapter together, as 60MB: widths, group sizes (--group-size halved, as it "
            "is, doubled) and ranks (from --rank / 4 to 4 x --rank) are chosen at once.",
            show_default=False,
            rich_help_panel=BUDGET_PANEL,
        ),
    ],
    "bits_choices": Annotated[
        str | None,
        typer.Option(
            help="The widths that --target-bits and --target-size choose from.",
            show_default="2,3,4,8",
            rich_help_panel=BUDGET_PANEL,
        ),
    ],
    "allocation": Annotated[
        str | None,
        typer.Option(
            help="sensitivity (measured, then solved exactly), or a rule: uniform, first, last, random.",
            show_default="sensitivity",
            rich_help_panel=BUDGET_PANEL,
        ),
    ],
    "tie": Annotated[
        str | None,
        typer.Option(
            help="fused: one width for q, k and v of a block, and for gate and up, as fused kernels need.",
            show_default="none; fused where mixed widths are packed",
            rich_help_panel=BUDGET_PANEL,
        ),
    ],
    "sensitivity": Annotated[
        Path | None,
        typer.Option(
            help="A sensitivity.json of an earlier run, to measure nothing.",
            show_default=False,
            rich_help_panel=BUDGET_PANEL,
        ),
    ],
    "rank_budget": Annotated[
        str | None,
        typer.Option(
            help="Size of the adapter, as 20MB: each layer's rank is then chosen too, from --rank / 4 to 4 x --rank.",
            show_default=False,
            rich_help_panel=BUDGET_PANEL,
        ),
    ],
    "seed": Annotated[int | None, typer.Option(show_default="0", rich_help_panel=METHOD_PANEL)],
    "format": Annotated[
        str | None,
        typer.Option(
            help="gptq (packed) or dense (16 bits, loads anywhere).", show_default="gptq", rich_help_panel=OUTPUT_PANEL
        ),
    ],
    "save_dir": Annotated[
        Path | None,
        typer.Option(
            help="Where the run's directory is made.", show_default="model_zoo/{command}", rich_help_panel=OUTPUT_PANEL
        ),
    ],
    "out": Annotated[
        Path | None,
        typer.Option(help="The run's directory itself, not a name under --save-dir.", rich_help_panel=OUTPUT_PANEL),
    ],
    "max_shard_size": Annotated[str | None, typer.Option(show_default="5GB", rich_help_panel=OUTPUT_PANEL)],
    "overwrite": Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run's directory.", rich_help_panel=OUTPUT_PANEL)
    ],
    "push_to_hub": Annotated[
        str | None,
        typer.Option(
            metavar="REPO_ID", help="Then push the run there, as `qinit push` does.", rich_help_panel=OUTPUT_PANEL
        ),
    ],
    "private": Annotated[
        bool,
        typer.Option("--private", help="Make that repository a private one.", rich_help_panel=OUTPUT_PANEL),
    ],
    "check": Annotated[
        bool | None,
        typer.Option(
            "--check/--no-check",
            help="At the end, look for every name as stock loaders do, and measure how close it is to the original: "
            "KL and top-1 agreement on a few thousand tokens.",
            show_default="check",
            rich_help_panel=RUN_PANEL,
        ),
    ],
    "device": Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or cuda:N.", show_default="auto", rich_help_panel=RUN_PANEL)
    ],
    "dry_run": Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and stop; reads no weights.", rich_help_panel=RUN_PANEL)
    ],
    "json_output": Annotated[
        bool,
        typer.Option("--json", help="The result as JSON on stdout, all else on stderr.", rich_help_panel=RUN_PANEL),
    ],
    "quiet": Annotated[bool, typer.Option("--quiet", help="No progress, no table.", rich_help_panel=RUN_PANEL)],
    "debug": Annotated[
        bool,
        typer.Option("--debug", help="Show tracebacks, and where the time of a run went.", rich_help_panel=RUN_PANEL),
    ],
}
# Of commands on a finished run.
RUN = Annotated[Path, typer.Argument(metavar="DIR", help="A run's directory, which holds qinit.json.")]
IN_ITS_PLACE = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="An adapter that was trained on the run, as PEFT saved it: it takes the place of the run's own.",
        show_default="the run's own",
    ),
]
TRUSTED = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that lies in DIR; it can do anything that you can.")
]
AS_JSON = Annotated[bool, typer.Option("--json", help="The result as JSON on stdout, all else on stderr.")]
DEBUG = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]

READING = ("model", "recipe", "revision", "token", "trust_remote_code")
QUANTIZING = ("rank", "iter", "group_size", "symmetric")
MIXING = (
    "ratio",
    "bits_low",
    "bits_high",
    "target_bits",
    "count_adapter",
    "target_size",
    "bits_choices",
    "allocation",
    "tie",
    "sensitivity",
    "rank_budget",
)
CALIBRATING = (
    *(
        "calibration",
        "calibration_budget",
        "text_field",
        "calibration_samples",
        "calibration_length",
        "calibration_mode",
    ),
    *("rounding", "act_order", "quality", "polish"),
)
CHOOSING = ("target_modules", "exclude", "lora_alpha", "use_rslora", "seed")
WRITING = ("format", "save_dir", "out", "max_shard_size", "overwrite", "push_to_hub", "private")
RUNNING = ("device", "dry_run", "json_output", "quiet", "debug")
# What is no part of a recipe, though it has an option.
BESIDE_THE_RECIPE = {
    *("recipe", "token", "save_dir", "out", "overwrite", "push_to_hub", "private"),
    *("dry_run", "json_output", "quiet", "debug"),
}


def takes(*names: str, **own: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command its `own` options and these, in this order (own ones may have a place among the names); it gets
    them by keyword, None (a flag False) when left out. One whose type has no None must be given."""
    first = {name: option for name, option in own.items() if name not in names}
    options = {**first, **{name: own.get(name) or OPTIONS[name] for name in names}}

    def give(command: Callable[..., None]) -> Callable[..., None]:
        parameters = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=_default(option.__origin__),
                annotation=option,
            )
            for name, option in options.items()
        ]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = options
        return command

    return give


def _default(kind: Any) -> Any:
    if kind is bool:
        return False
    return None if NoneType in get_args(kind) else inspect.Parameter.empty


def recipe_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return those of a command's options that are the recipe's."""
    values = {name: value for name, value in options.items() if name not in BESIDE_THE_RECIPE}
    if values.get("sensitivity") is not None:
        values["sensitivity"] = str(values["sensitivity"])
    return values
