"""`qinit eqft` and `qinit meqft`: quantize a checkpoint and initialize its LoRA adapter."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from qinit_cli.options import (
    CALIBRATING,
    CHOOSING,
    MIXING,
    QUANTIZING,
    READING,
    RUNNING,
    WRITING,
    recipe_options,
    takes,
)
from qinit_cli.plan import find_plan, show_plan
from qinit_cli.push import push_after_run
from qinit_cli.verify import WANTING

if TYPE_CHECKING:
    from qinit.processes.group import Processes


@takes(*READING, "bits", *QUANTIZING, *CALIBRATING, *CHOOSING, *WRITING, "check", *RUNNING)
def eqft(**options: Any) -> None:
    """Quantize a checkpoint to 2, 3, 4 or 8 bits and write a LoRA adapter that repairs the quantization."""
    _quantize("eqft", options)


@takes(*READING, *MIXING, *QUANTIZING, *CALIBRATING, *CHOOSING, *WRITING, "check", *RUNNING)
def meqft(**options: Any) -> None:
    """Quantize with a width for each layer, chosen under a budget (--ratio, --target-bits, --target-size)."""
    _quantize("meqft", options)


def _quantize(command: str, options: dict[str, Any]) -> None:
    from qinit.processes.join import joined

    with joined() as processes:
        lost = _quantized(command, options, processes)
    if lost:
        raise typer.Exit(WANTING)


def _quantized(command: str, options: dict[str, Any], processes: Processes) -> bool:
    """Carry out the command, or this process's part of it; returns whether stock loaders would lose a part of the
    result."""
    from qinit_cli.draw import Screen

    from qinit.errors import RecipeError
    from qinit.processes.join import require_device
    from qinit.recipe import make_recipe

    screen = Screen(quiet=options["quiet"], to_stderr=options["json_output"])
    repo_id = options.get("push_to_hub")
    if options.get("private") and not repo_id:
        raise RecipeError("--private: is about --push-to-hub REPO_ID, which is not given")
    recipe = make_recipe(options["recipe"], **recipe_options(options))
    if command == "meqft" and not recipe.mixed:
        raise RecipeError("meqft: give --ratio (0 to 1), --target-bits or --target-size; for one width use qinit eqft")
    if command == "eqft" and recipe.mixed:
        raise RecipeError(f"{options['recipe']}: asks for mixed widths; use qinit meqft")
    require_device(recipe.device)
    if repo_id and processes.first:
        from qinit.hub.prepare import require_name
        from qinit.hub.push import require_ready

        require_name(repo_id) if options["dry_run"] else require_ready(repo_id, options["token"])
    if options["dry_run"]:
        if processes.first:
            show_plan(screen, recipe, options)
        return False
    made, out = find_plan(screen, recipe, options)

    from qinit.clock import Clock
    from qinit.machine import pick_device
    from qinit.planner.time import expected
    from qinit.runner.loadable import is_lost
    from qinit.runner.run import run
    from qinit.workplace.place import check_output

    overwrite, token = options["overwrite"], options["token"]
    target = {"private": options["private"], "token": token}
    if processes.first:
        check_output(made, out, overwrite)
        if repo_id:  # a night's run must not fail at its last step
            from qinit.hub.push import open_target

            open_target(repo_id, **target)
    words = typed(sys.argv[1:])
    events = run(made, out, overwrite=overwrite, command=words, token=token, processes=processes)
    if not processes.first:
        with interruptible(out), closing(events):
            for _ in events:
                pass
        return False
    said, clock = (*made.notes, *expected(made, pick_device(recipe.device))), Clock()
    with interruptible(out), clock if options["debug"] else nullcontext():
        report = screen.follow(made, events, said)
    if options["debug"]:
        show_split(clock.split())
    pushed, lost = None, is_lost(report.notes)
    try:
        if repo_id and lost:
            screen.say(f"not pushed to {repo_id}, as stock loaders would lose a part of it")
        elif repo_id:
            pushed = push_after_run(screen, out, repo_id, **target)
    finally:
        if options["json_output"]:
            screen.json_report(report, out, **({"pushed": pushed} if repo_id else {}))
    return lost


@contextmanager
def interruptible(out: Path, left: Callable[[Path], str] | None = None) -> Iterator[None]:
    """Let SIGTERM end the run as Ctrl-C does, and say what is kept of it then: what `left` says of `out`."""
    from qinit.errors import StoppedError
    from qinit.workplace.place import kept

    left = left or kept
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        raise StoppedError(f"interrupted; {left(out) or 'nothing was left behind'}") from None
    finally:
        signal.signal(signal.SIGTERM, before)


def show_split(seconds: dict[str, float]) -> None:
    """Say on stderr where a run's time went."""
    total = sum(seconds.values())
    print(f"where {total:.1f} s went, those of the host:", file=sys.stderr)
    for name, value in seconds.items():
        print(f"{value:9.1f} s {100 * value / total:4.0f} %  {name}", file=sys.stderr)


def typed(arguments: list[str]) -> str:
    """Return the command as typed, without the token, and with escapes for bytes that are no text."""
    from qinit.files.reading import printable

    words = ["qinit"]
    for word in arguments:
        if words[-1] == "--token":
            word = "$HF_TOKEN"
        elif word.startswith("--token="):
            word = "--token=$HF_TOKEN"
        words.append(word)
    return printable(" ".join(word if "$HF_TOKEN" in word else shlex.quote(word) for word in words))
