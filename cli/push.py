"""`qinit push`: a finished run onto the Hub; also what `--push-to-hub` does after a run."""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from qinit_cli.options import AS_JSON, DEBUG, IN_ITS_PLACE, RUN

if TYPE_CHECKING:
    from qinit_cli.draw import Screen

    from qinit.hub.prepare import Prepared
    from qinit.hub.push import Pushed


def push(
    directory: RUN,
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="OWNER/NAME on the Hub; made if it is missing.")],
    adapter: IN_ITS_PLACE = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="Of an adapter alone: the base that it is for, on the Hub.",
            show_default="as the adapter names it, unless that is a place on this machine",
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository a private one.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to push to; made if it is missing.", show_default="main")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and list what would be pushed; contacts nobody.")
    ] = False,
    token: Annotated[
        str | None, typer.Option(help="Hub token; better HF_TOKEN, which no history keeps. Never printed.")
    ] = None,
    json_output: AS_JSON = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no table.")] = False,
    debug: DEBUG = False,
) -> None:
    """Push a finished run to the Hub: base, adapter, card and report, so that the repo id alone loads it; or an adapter
    alone, which names its base there."""
    from qinit_cli.draw import Screen

    from qinit.errors import HubError, StoppedError
    from qinit.hub.prepare import prepare
    from qinit.hub.push import push as push_prepared
    from qinit.hub.push import require_ready

    if create_pr and revision:
        raise HubError("--create-pr: opens a pull request to the main branch; leave --revision out")
    screen = Screen(quiet=quiet, to_stderr=json_output)
    if not dry_run:
        require_ready(repo_id, token)
    quiet_hub(quiet, debug)
    prepared = prepare(directory, repo_id, adapter, base)
    _say_what(screen, prepared)
    if dry_run:
        _draw(screen, prepared, revision, create_pr)
        result: dict[str, Any] = {"changes": [asdict(change) for change in prepared.changes]}
    else:
        try:
            pushed = push_prepared(prepared, revision=revision, private=private, create_pr=create_pr, token=token)
        except KeyboardInterrupt:
            raise StoppedError(_stopped(directory, repo_id, private, adapter)) from None
        _say_where(screen, prepared, pushed)
        result = _as_json(prepared, pushed)
    if json_output:
        files = [{"name": name, "bytes": size} for name, size in prepared.files.items()]
        result |= {"repo_id": repo_id, "files": files, "left_out": prepared.left_out}
        sys.stdout.write(json.dumps(result) + "\n")


def push_after_run(
    screen: Screen, directory: Path, repo_id: str, *, private: bool, token: str | None
) -> dict[str, Any]:
    """Push the run that has just been put in its place, and return what --json says of it.

    What goes wrong is no reason to run again, and the error says so.
    """
    from qinit.errors import HubError, QinitError, StoppedError
    from qinit.hub.prepare import prepare
    from qinit.hub.push import push as push_prepared

    try:
        prepared = prepare(directory, repo_id)
        _say_what(screen, prepared)
        pushed = push_prepared(prepared, private=private, token=token)
    except KeyboardInterrupt:
        raise StoppedError(_stopped(directory, repo_id, private)) from None
    except QinitError as error:
        raise HubError(
            f"{error}. The run is complete in {directory}; to push it: {_again(directory, repo_id, private)}"
        ) from error
    _say_where(screen, prepared, pushed)
    return _as_json(prepared, pushed)


def quiet_hub(quiet: bool, debug: bool) -> None:
    """Leave the reports of tries and retries to --debug and HF_HUB_VERBOSITY, as how it ends is one line of ours, and
    the bars to terminals."""
    from huggingface_hub.utils import disable_progress_bars, logging

    if not debug and not os.environ.get("HF_HUB_VERBOSITY") and not os.environ.get("HF_DEBUG"):
        logging.set_verbosity_error()
    if quiet or not sys.stderr.isatty():
        disable_progress_bars()


def _stopped(directory: Path, repo_id: str, private: bool, adapter: Path | None = None) -> str:
    again = _again(directory, repo_id, private) + (f" --adapter {shlex.quote(str(adapter))}" if adapter else "")
    return f"interrupted; the run is complete in {directory}, and {repo_id} may hold a part of it; to go on: {again}"


def _again(directory: Path, repo_id: str, private: bool) -> str:
    return f"qinit push {shlex.quote(str(directory))} {repo_id}{' --private' if private else ''}"


def _as_json(prepared: Prepared, pushed: Pushed) -> dict[str, Any]:
    return {**asdict(pushed), "load": prepared.snippet(pushed.revision)}


def _say_what(screen: Screen, prepared: Prepared) -> None:
    from qinit_cli.draw import size

    screen.say(f"to {prepared.repo_id}: {len(prepared.files)} files, {size(prepared.nbytes)}")
    if prepared.left_out:
        screen.say(f"note: not pushed, as the run did not write it: {', '.join(prepared.left_out)}")
    for note in prepared.notes:
        screen.say(f"note: {note}")


def _say_where(screen: Screen, prepared: Prepared, pushed: Pushed) -> None:
    screen.say(f"pushed to {pushed.url}")
    if pushed.pull_request:
        screen.say(f"pull request: {pushed.pull_request}")
    screen.say("Load it:")
    for line in prepared.snippet(pushed.revision):
        screen.say(f"    {line}")


def _draw(screen: Screen, prepared: Prepared, revision: str | None, create_pr: bool) -> None:
    """List every file and what is another one than in the directory."""
    from qinit_cli.draw import size

    width = max(map(len, prepared.files))
    for name, nbytes in prepared.files.items():
        screen.say(f"  {name:{width}}  {size(nbytes):>9}{'  made anew' if name in prepared.rewritten else ''}")
    for change in prepared.changes:
        screen.say(f"{change.file}, {change.field}: {change.before} -> {change.after}")
    place = "a new pull request" if create_pr else f"branch {revision or 'main'}"
    screen.say(f"would go to {place} of {prepared.repo_id}; nothing was sent")
