"""The command table, and the one place where an error becomes a line on stderr and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer
from qinit_cli.adapter import adapter
from qinit_cli.compare import compare
from qinit_cli.doctor import doctor
from qinit_cli.eqft import eqft, meqft
from qinit_cli.eval import evaluate
from qinit_cli.export import export
from qinit_cli.hide_token import hide_token
from qinit_cli.merge import merge
from qinit_cli.methods import methods
from qinit_cli.plan import plan
from qinit_cli.polish import polish
from qinit_cli.push import push
from qinit_cli.report import report
from qinit_cli.snndlft import snndlft
from qinit_cli.trainer_config import trainer_config
from qinit_cli.verify import verify

INTERRUPTED = "interrupted; nothing was left behind"
LONGEST_ERROR = 2000  # characters
SHARED = ("eqft", "meqft", "compare")  # commands that several processes can carry out together

app = typer.Typer(
    name="qinit",
    help="Quantized bases and LoRA adapters that start fine-tuning close to full precision.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(eqft)
app.command()(meqft)
app.command()(plan)
app.command()(adapter)
app.command()(polish)
app.command()(methods)
app.command()(report)
app.command()(push)
app.command("eval")(evaluate)
app.command()(verify)
app.command("trainer-config")(trainer_config)
app.command()(export)
app.command()(merge)
app.command()(doctor)
app.command()(compare)
app.command()(snndlft)


def _show_version(value: bool) -> None:
    if value:
        from qinit import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    from qinit.processes.launch import count

    if count() > 1 and context.invoked_subcommand not in SHARED:
        from qinit.errors import ProcessesError

        raise ProcessesError(
            f"{context.invoked_subcommand}: is done by one process, and {count()} were started; start it without "
            f"torchrun ({' and '.join(SHARED)} take several)"
        )


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 an error inside qinit (doctor: qinit does not work here), 2 bad
    input, 3 verify has found something, 130 interrupted."""
    hide_token()
    debug = "--debug" in sys.argv
    from qinit.processes.launch import speaks

    if not (speaks() or debug):
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends
    from qinit.errors import QinitError, StoppedError

    # Large tensors come and go for every layer: huge pages make them a tenth as expensive to get (torch's switch).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Waiting threads sleep: spinning saves 3 % on idle cores and more than doubles the time on busy ones.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        app()
    except KeyboardInterrupt:
        _fail(INTERRUPTED, 130)
    except SystemExit as stop:
        if stop.code == 130:  # what Typer makes of Ctrl-C, without a word
            _fail(INTERRUPTED, 130)
        raise
    except StoppedError as error:
        _fail(str(error), 130)
    except QinitError as error:
        if debug:
            traceback.print_exc()
        _fail(_with_notes(str(error), error), 2)
    except Exception as error:
        if debug:
            traceback.print_exc()
        if type(error).__name__ == "OutOfMemoryError":  # torch's
            said = " ".join(str(error).split())[:300]
            _fail(_with_notes(f"a device's memory is used up ({said}); use --device cpu, or free it", error), 2)
        message = f"inside qinit: {type(error).__name__}: {error} (run again with --debug and please report it)"
        _fail(_with_notes(message, error), 1)


def _with_notes(message: str, error: Exception) -> str:
    """Add what the library has noted on the way, such as what is kept of a run."""
    return "; ".join([message, *getattr(error, "__notes__", [])])


def _fail(message: str, code: int) -> None:
    from qinit.files.reading import printable

    line = printable(" ".join(message.splitlines()))
    if len(line) > LONGEST_ERROR:  # someone's file was quoted in it
        line = f"{line[: LONGEST_ERROR // 2]} ... {line[-LONGEST_ERROR // 2 :]}"
    print(f"error: {line}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
