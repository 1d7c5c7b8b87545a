"""`qinit verify`: reread a run's directory and say whether it is still what was written."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from qinit_cli.options import DEBUG, TRUSTED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qinit.verification.findings import Event, Finding

WANTING = 3  # the exit code when something was found
SHOWN = 20  # findings in words; --json has them all


def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run's directory, or an export's.")],
    source: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="What the run was made from, a directory or a Hub id: every layer's errors are measured anew. Of a "
            "merge or an export the run's directory: every value is made anew, or compared.",
            show_default=False,
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of MODEL on the Hub.", show_default="the run's own")
    ] = None,
    token: Annotated[str | None, typer.Option(help="Hub token; HF_TOKEN is used when left out. Never printed.")] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="An adapter that was trained on the run, as PEFT saved it: checked too, and loaded.",
            show_default="the run's own",
        ),
    ] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Of a model that memory does not hold: load and compare it block by block.")
    ] = False,
    trust_remote_code: TRUSTED = False,
    server: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="SERVER",
            help="Only hold base and adapter against what a server loads, by configurations alone: transformers, vllm, "
            "llama.cpp or mlx. DIR may be an export too.",
            show_default=False,
        ),
    ] = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="Of a run that was moved: make the adapter name its base where it is now.")
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Everything that was found as JSON on stdout, nothing else.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Nothing but the exit code.")] = False,
    debug: DEBUG = False,
) -> None:
    """Reread what was written: hashes, shapes, values, errors, the adapter's scale and base; then load it.

    Of an export: hashes, structure, finite values, and with --source RUN the values of Q and of the adapter. Of what
    `qinit snndlft` wrote: hashes, ranks, finite values, and base and adapter loaded and run.

    What is in order is loaded by stock transformers and PEFT, in a process of its own, and run forward and back: every
    tensor must find its place, the predictions must be those of Q + s B A in the files, and every factor must get a
    gradient.

    Exit code 0: sound. 3: something is wrong, and named. 2: DIR is no run, or the source cannot be read.
    """
    from qinit_cli.draw import Screen
    from qinit_cli.hush import hush

    from qinit.adapters.trained import read_trained
    from qinit.report.merged import is_merge
    from qinit.report.report import is_training
    from qinit.verification.exported import verify_export
    from qinit.verification.factors import point_to
    from qinit.verification.merged import verify_merged
    from qinit.verification.verify import exported
    from qinit.verification.verify import verify as verified

    hush()
    screen = Screen(quiet=quiet or json_output)
    options = {"trust_remote_code": trust_remote_code}
    if server is not None:
        _served(screen, directory, server, adapter, json_output)
        return
    merged, export, training = is_merge(directory), exported(directory), is_training(directory)
    original = None if merged or export or training else _source(directory, source, revision, token)
    if training:
        events = _training(directory, {"--source": source, "--adapter": adapter}, **options)
    elif merged or export:
        events = _made_of(verify_merged if merged else verify_export, directory, source, adapter, **options)
    else:
        events = verified(directory, original, **options)
    found, counts, loaded = _followed(screen, events)
    if adapter is not None and not export:
        read_trained(adapter)
    if not (merged or export or training) and not any(each.grave for each in found):
        more, _, loaded = _followed(screen, _tried(directory, adapter, original, deep=deep, **options))
        found += more
    fixed = fix and any(each.moved for each in found) and all(each.moved or not each.grave for each in found)
    if fixed:
        point_to(directory)
        found = [each for each in found if not each.moved]
    problems = [each for each in found if each.grave]
    for each in found[:SHOWN]:
        screen.say(str(each) if each.grave else f"note: {each}")
    if len(found) > SHOWN:
        screen.say(f"... and {len(found) - SHOWN} more (--json has them all)")
    if fixed:
        screen.say(f"fixed: the adapter names {directory.resolve()} as its base")
    elif any(each.moved for each in found):
        advice = "once the rest is in order" if len([each for each in problems if not each.moved]) else "to do so"
        screen.say(f"`qinit verify {directory} --fix` makes the adapter name its base where it is now; run it {advice}")
    screen.say(_verdict(directory, len(problems), counts, source))
    if loaded:
        screen.say(loaded)
    if json_output:
        kinds = {"problems": problems, "notes": [each for each in found if not each.grave]}
        value = {"directory": str(directory.resolve()), "sound": not problems, "fixed": fixed, "checked": counts}
        value["loaded"] = loaded or None
        rows = {kind: [_described(each) for each in findings] for kind, findings in kinds.items()}
        sys.stdout.write(json.dumps({**value, **rows}) + "\n")
    if problems:
        raise typer.Exit(WANTING)


def _source(directory: Path, model: str | None, revision: str | None, token: str | None) -> Path | None:
    """Find the source; of a Hub id, the revision that the run was made from, unless another is asked for."""
    if model is None:
        return None
    from qinit.errors import ReportError
    from qinit.hub.download import local_directory
    from qinit.report.report import Report

    if revision is None and not Path(model).is_dir():
        try:
            made_from = Report.read(directory).source
        except ReportError:
            made_from = {}  # it will be found wanting
        revision = made_from.get("revision") if made_from.get("model") == model else None
    return local_directory(model, revision, token)


def _served(screen: Any, directory: Path, server: str, adapter: Path | None, json_output: bool) -> None:
    """Say what a server does not load, one line for each finding."""
    from qinit.verification.serving import check_serving

    found = list(check_serving(directory, server, adapter))
    problems = [each for each in found if each.grave]
    for each in found:
        screen.say(str(each) if each.grave else f"note: {each}")
    many = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}" if problems else "nothing against it"
    screen.say(f"{directory} for {server}: {many} (configurations alone were read)")
    if json_output:
        value = {"directory": str(directory.resolve()), "server": server, "sound": not problems}
        value |= {"problems": [_described(each) for each in problems]}
        value |= {"notes": [_described(each) for each in found if not each.grave]}
        sys.stdout.write(json.dumps(value) + "\n")
    if problems:
        raise typer.Exit(WANTING)


def _training(directory: Path, others: dict[str, Any], **options: Any) -> Iterator[Event]:
    """Check what `qinit snndlft` wrote, which has no source and no other adapter."""
    from qinit.errors import RecipeError
    from qinit.snndlft.verification import verify_training

    if given := [name for name, value in others.items() if value is not None]:
        raise RecipeError(f"{given[0]}: is about runs, and {directory} is a training; leave it out")
    return verify_training(directory, **options)


def _made_of(
    check: Callable[..., Iterator[Event]], directory: Path, run: str | None, adapter: Path | None, **options: Any
) -> Iterator[Event]:
    """Check a merge or an export; what it was made from is a run, and an adapter where that was not the run's own."""
    from qinit.errors import RecipeError

    if adapter is not None and run is None:
        raise RecipeError(f"--adapter: give the run that {directory} was made from too, with --source RUN")
    return check(directory, None if run is None else Path(run), adapter, **options)


def _tried(
    directory: Path, adapter: Path | None, source: Path | None, *, deep: bool, trust_remote_code: bool
) -> Iterator[Event]:
    """Load the run, with another adapter than its own where there is one and it fits."""
    from qinit.verification.findings import Finding
    from qinit.verification.loading import check_loading
    from qinit.verification.trained import check_trained

    fits = True
    for event in check_trained(directory, adapter) if adapter is not None else ():
        fits = fits and not isinstance(event, Finding)
        yield event
    if fits:
        yield from check_loading(directory, adapter, source, deep=deep, trust_remote_code=trust_remote_code)


def _followed(screen: Any, events: Iterator[Event]) -> tuple[list[Finding], dict[str, int], str]:
    """Draw the progress; returns what was found, how much was looked at, and what was loaded."""
    from qinit.verification.findings import Checked, Finding, Stage

    found: list[Finding] = []
    loaded = ""
    counts = Counter({"file": 0, "tensor": 0, "layer": 0})
    with screen.progress() as progress:
        task = progress.add_task("starting", total=None)
        for event in events:
            match event:
                case Stage(what, nbytes):
                    progress.reset(task, total=nbytes, description=what)
                case Checked("loaded", what, _):
                    loaded = what
                case Checked(kind, name, nbytes):
                    counts[kind] += 1
                    progress.update(task, advance=nbytes, description=name)
                case Finding():
                    found.append(event)
    return found, {f"{kind}s": count for kind, count in counts.items()}, loaded


def _verdict(directory: Path, problems: int, counts: dict[str, int], source: str | None) -> str:
    looked = f"{counts['files']} files by their hashes, {counts['tensors']} tensors by their values"
    if source is not None:
        looked += f", {counts['layers']} layers by their errors against {source}"
    if not problems:
        return f"{directory}: sound ({looked})"
    return f"{directory}: {problems} problem{'s' if problems > 1 else ''} ({looked})"


def _described(finding: Finding) -> dict[str, Any]:
    return {"file": finding.file, "what": finding.what, "expected": finding.expected, "found": finding.found}
