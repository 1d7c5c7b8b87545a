"""`qinit trainer-config`: what a trainer needs to go on from a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from qinit_cli.options import DEBUG, RUN


def trainer_config(
    directory: RUN,
    trainer: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="transformers, trl, llama-factory, axolotl, unsloth, ms-swift, torchtune or mlx-lm.",
            show_default=False,
        ),
    ],
    data: Annotated[
        Path, typer.Option(metavar="FILE", help="What it is to train on: JSON Lines, as what is written says.")
    ] = Path("train.jsonl"),
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to write it.", show_default="stdout")] = None,
    debug: DEBUG = False,
) -> None:
    """Write the script or the configuration with which a trainer goes on from a run, its start kept.

    Exit code 2: the trainer cannot take the run; the reason and what would work are said.
    """
    from qinit_cli.hush import hush

    hush()
    from qinit.trainers.write import config_for, trainer_named, write_config

    text = config_for(directory, trainer, data.resolve())
    if out is None:
        typer.echo(text, nl=False)
        return
    write_config(text, out)
    typer.echo(f"wrote {out}; run: {trainer_named(trainer).command.format(file=out)}")
