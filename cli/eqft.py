"""`qinit eqft`: quantize a checkpoint and initialize its LoRA adapter."""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

MODEL_PANEL, METHOD_PANEL, DATA_PANEL = "What to read", "How to quantize", "Calibration"
OUTPUT_PANEL, RUN_PANEL = "What to write", "Running"


def eqft(
    model: Annotated[
        str | None,
        typer.Argument(help="A local directory or a Hub id. Left out: the embedded demo model.", show_default=False),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="A YAML file with these options by name; flags win over it.", rich_help_panel=MODEL_PANEL),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit on the Hub.", rich_help_panel=MODEL_PANEL)
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(help="Hub token; HF_TOKEN is used when left out. Never printed.", rich_help_panel=MODEL_PANEL),
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="2, 3, 4 or 8.", show_default="2", rich_help_panel=METHOD_PANEL)
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Rank of the adapter.", show_default="16", rich_help_panel=METHOD_PANEL)
    ] = None,
    iter: Annotated[
        int | None,
        typer.Option(
            "--iter",
            help="Rounds of quantize and fit.",
            show_default="2, without calibration 5",
            rich_help_panel=METHOD_PANEL,
        ),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale.", show_default="64", rich_help_panel=METHOD_PANEL)
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="What the layers are measured on: a text or JSONL file, self (text that the model writes), random "
            "(random tokens), the id of a data set on the Hub, or none.",
            show_default="auto: self where it takes minutes, else none",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    text_field: Annotated[
        str | None,
        typer.Option(help="The field that holds the text.", show_default="text", rich_help_panel=DATA_PANEL),
    ] = None,
    calibration_samples: Annotated[
        int | None, typer.Option(help="Pieces of text.", show_default="128", rich_help_panel=DATA_PANEL)
    ] = None,
    calibration_length: Annotated[
        int | None, typer.Option(help="Tokens in each piece.", show_default="512", rich_help_panel=DATA_PANEL)
    ] = None,
    calibration_mode: Annotated[
        str | None,
        typer.Option(
            help="sequential: later layers make good what earlier ones left; parallel: one pass, each for itself.",
            show_default="sequential",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    rounding: Annotated[
        str | None,
        typer.Option(help="gptq (error feedback) or nearest.", show_default="gptq", rich_help_panel=DATA_PANEL),
    ] = None,
    act_order: Annotated[
        bool | None,
        typer.Option(
            "--act-order/--no-act-order",
            help="Round the columns with the largest inputs first.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    polish: Annotated[
        int | None,
        typer.Option(
            metavar="STEPS",
            help="Then train all adapters together towards the full-precision model; needs it in memory.",
            show_default="0",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(
            help="all-linear, names like q_proj,v_proj, or a regular expression for whole names.",
            show_default="all-linear",
            rich_help_panel=METHOD_PANEL,
        ),
    ] = None,
    exclude: Annotated[
        str | None,
        typer.Option(help="Names or a regular expression to leave out.", rich_help_panel=METHOD_PANEL),
    ] = None,
    lora_alpha: Annotated[float | None, typer.Option(show_default="the rank", rich_help_panel=METHOD_PANEL)] = None,
    use_rslora: Annotated[
        bool | None,
        typer.Option(
            "--use-rslora/--no-use-rslora",
            help="Scale the adapter by lora_alpha / sqrt(rank).",
            rich_help_panel=METHOD_PANEL,
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(show_default="0", rich_help_panel=METHOD_PANEL)] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="gptq (packed) or dense (16 bits, loads anywhere).", show_default="gptq", rich_help_panel=OUTPUT_PANEL
        ),
    ] = None,
    save_dir: Annotated[
        Path, typer.Option(help="Where the run's directory is made.", rich_help_panel=OUTPUT_PANEL)
    ] = Path("model_zoo/eqft"),
    out: Annotated[
        Path | None,
        typer.Option(help="The run's directory itself, not a name under --save-dir.", rich_help_panel=OUTPUT_PANEL),
    ] = None,
    max_shard_size: Annotated[str | None, typer.Option(show_default="5GB", rich_help_panel=OUTPUT_PANEL)] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run's directory.", rich_help_panel=OUTPUT_PANEL)
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or cuda:N.", show_default="auto", rich_help_panel=RUN_PANEL)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and stop; reads no weights.", rich_help_panel=RUN_PANEL)
    ] = False,
    json_output: Annotated[
        bool,
        typer.Option("--json", help="The result as JSON on stdout, all else on stderr.", rich_help_panel=RUN_PANEL),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no table.", rich_help_panel=RUN_PANEL)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.", rich_help_panel=RUN_PANEL)] = False,
) -> None:
    """Quantize a checkpoint to 2, 3, 4 or 8 bits and write a LoRA adapter that repairs the quantization."""
    from qinit_cli.draw import Screen

    from qinit.demo import DEMO_NAME, DEMO_TITLE, demo_directory
    from qinit.recipe import make_recipe

    screen = Screen(quiet=quiet, to_stderr=json_output)
    options = make_recipe(
        recipe,
        model=model,
        revision=revision,
        bits=bits,
        rank=rank,
        iter=iter,
        group_size=group_size,
        target_modules=target_modules,
        exclude=exclude,
        calibration=calibration,
        text_field=text_field,
        calibration_samples=calibration_samples,
        calibration_length=calibration_length,
        calibration_mode=calibration_mode,
        rounding=rounding,
        act_order=act_order,
        polish=polish,
        lora_alpha=lora_alpha,
        use_rslora=use_rslora,
        seed=seed,
        format=format,
        max_shard_size=max_shard_size,
        device=device,
    )
    if options.model is None:
        screen.say(f"No MODEL given: using {DEMO_TITLE}.")

    for chatty in ("torchao", "torch.utils._pytree"):  # they warn on stderr while transformers imports them
        logging.getLogger(chatty).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    from qinit.calibration.choice import expected
    from qinit.device import pick_device
    from qinit.hub import local_directory
    from qinit.output import check_output
    from qinit.plan import make_plan
    from qinit.runner import run

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    chosen_device = pick_device(options.device)
    if options.model is None:
        directory, name = demo_directory(), DEMO_NAME
    else:
        directory, name = local_directory(options.model, options.revision, token), options.model
    plan = make_plan(options, directory, name)
    if out is None:
        short = Path(name).resolve().name if Path(name).is_dir() else name.rsplit("/", 1)[-1]
        out = save_dir / f"{short}-{options.bits}bit-{options.rank}rank"
    for line in expected(plan, chosen_device):
        screen.say(f"note: {line}")
    if dry_run:
        screen.plan(plan, out)
        if json_output:
            screen.json_plan(plan, out)
        return
    check_output(plan, out, overwrite)
    report = screen.follow(plan, run(plan, out, overwrite=overwrite, command=_command(sys.argv[1:]), token=token))
    if json_output:
        screen.json_report(report, out)


def _command(arguments: list[str]) -> str:
    """Return the command as typed, without the token."""
    words = ["qinit"]
    for word in arguments:
        if words[-1] == "--token":
            word = "$HF_TOKEN"
        elif word.startswith("--token="):
            word = "--token=$HF_TOKEN"
        words.append(word)
    return " ".join(word if "$HF_TOKEN" in word else shlex.quote(word) for word in words)
