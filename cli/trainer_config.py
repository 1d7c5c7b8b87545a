"""`qinit trainer-config`: what a trainer needs to go on from a run, or to start from a template."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from qinit_cli.options import DEBUG


def trainer_config(
    target: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|TEMPLATE",
            help="A run's directory, or an adapter's alone; an adapter configuration that names its base, as a JSON "
            "file; or the name of one that comes with qinit, as lora_llama2_7b_rank8.",
        ),
    ],
    trainer: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="transformers, trl, llama-factory, axolotl, unsloth, ms-swift, torchtune or mlx-lm; peft is "
            "transformers, and llamafactory is llama-factory.",
            show_default=False,
        ),
    ],
    dataset: Annotated[
        str,
        typer.Option(
            "--dataset",
            "--data",
            metavar="NAME",
            help="What it is to train on: a file of JSON Lines, as what is written says, or a data set of the Hub.",
        ),
    ] = "train.jsonl",
    compared: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What `qinit compare --json` printed: the learning rate is the one that it found for the method and "
            "the width.",
            show_default="rate 1e-4",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to write it.", show_default="stdout")] = None,
    execute: Annotated[
        bool, typer.Option("--execute", help="Then run it, where the trainer is installed.", show_default=False)
    ] = False,
    debug: DEBUG = False,
) -> None:
    """Write the script or the configuration with which a trainer goes on from a run, its start kept, or starts from a
    template.

    Exit code 2: the trainer cannot take it, or is not installed where it is to be executed; the reason and what would
    work are said.
    """
    from qinit_cli.hush import hush

    hush()
    from qinit.machine import pick_device
    from qinit.trainers.execute import execute as run
    from qinit.trainers.execute import require_installed
    from qinit.trainers.write import config_for, write_config

    bf16 = not execute or pick_device("auto").type != "cpu"
    written = config_for(target, trainer, dataset, compared, bf16=bf16)
    if execute:
        require_installed(written)
    elif out is None:
        typer.echo(written.text, nl=False)
        return
    file = out or Path(written.file)
    write_config(written.text, file)
    if not execute:
        typer.echo(f"wrote {file}; run: {written.command_for(file)}")
        return
    typer.echo(f"wrote {file}, and runs it: {written.command_for(file)}")
    if code := run(written, file):
        typer.echo(f"error: {written.title} ended with exit code {code}; {file} is kept", err=True)
        raise typer.Exit(1)
