"""`qinit merge`: a finished run and an adapter on it as one ordinary model, or several adapters as one."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from qinit_cli.combine import merge_adapters
from qinit_cli.eqft import interruptible, typed
from qinit_cli.options import AS_JSON, DEBUG, TRUSTED

if TYPE_CHECKING:
    from qinit_cli.draw import Screen

    from qinit.merge.plan import MergePlan
    from qinit.report.merged import MergeReport


TOGETHER = "Several adapters of one base, as one adapter"


def merge(
    out: Annotated[Path, typer.Option(metavar="OUT", help="Where the result goes.", show_default=False)],
    directory: Annotated[
        Path | None,
        typer.Argument(
            metavar="DIR",
            help="A run's directory, which holds qinit.json. With --adapters what they were trained from, where "
            "that is not what they name as their base.",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="An adapter that was trained on the run, as PEFT saved it.",
            show_default="the run's own",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, float16 or bfloat16, for all weights.", show_default="each as the run's source has it"
        ),
    ] = None,
    requantize: Annotated[
        int | None,
        typer.Option(
            metavar="BITS",
            help="Then quantize the merged weights anew to BITS, without an adapter, and measure what that costs.",
            show_default=False,
        ),
    ] = None,
    max_shard_size: Annotated[str | None, typer.Option(show_default="5GB")] = None,
    device: Annotated[
        str | None, typer.Option(help="Of --requantize: auto, cpu, cuda or cuda:N.", show_default="auto")
    ] = None,
    adapters: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Adapters that were trained on one base, as PEFT saved them.",
            show_default=False,
            rich_help_panel=TOGETHER,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="X,Y", help="A number for each of them.", show_default=False, rich_help_panel=TOGETHER),
    ] = None,
    combination: Annotated[
        str | None,
        typer.Option(
            help="linear, svd, ties, dare_ties, dare_linear or magnitude_prune, as PEFT's add_weighted_adapter.",
            show_default="linear",
            rich_help_panel=TOGETHER,
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            help="The share of values that all but linear and svd keep.", show_default="0.5", rich_help_panel=TOGETHER
        ),
    ] = None,
    trust_remote_code: TRUSTED = False,
    json_output: AS_JSON = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no table.")] = False,
    debug: DEBUG = False,
) -> None:
    """Merge an adapter into the quantized base that it was trained on: W' = Q + s B A, one ordinary model.

    Never into the 16-bit original, which nobody trained on. The adapter may come from any trainer. A merge that was
    broken off goes on with the same command.

    With --adapters, several adapters of one base become one: what training added to each, weighted, and the start that
    all of them had once.
    """
    from qinit_cli.draw import Screen
    from qinit_cli.hush import hush

    hush()
    from qinit.errors import RecipeError

    own = {"--weights": weights, "--combination": combination, "--density": density}
    if adapters is not None:
        others = {"--adapter": adapter, "--dtype": dtype, "--requantize": requantize}
        _require_none({**others, "--max-shard-size": max_shard_size, "--device": device}, "a merge into the base")
        merge_adapters(
            *(directory, out, adapters, weights, combination, density),
            trust_remote_code=trust_remote_code,
            json_output=json_output,
            quiet=quiet,
        )
        return
    _require_none(own, "--adapters, which is not given")
    if directory is None:
        raise RecipeError("DIR: missing; give a run's directory, or several adapters with --adapters A,B")
    from qinit.merge.plan import plan_merge
    from qinit.merge.requantize import recipe_for
    from qinit.merge.run import Merged, check_place
    from qinit.merge.run import merge as merged

    screen = Screen(quiet=quiet, to_stderr=json_output)
    if device is not None and requantize is None:
        raise RecipeError("--device: is about --requantize, which is not given; a merge is made on the CPU")
    options = {"dtype": dtype, "max_shard_size": max_shard_size, "trust_remote_code": trust_remote_code}
    plan = plan_merge(directory, adapter, **options)  # type: ignore[arg-type]
    for note in plan.notes:
        screen.say(f"note: {note}")
    command = typed(sys.argv[1:])
    report = None
    if requantize is not None:
        recipe = recipe_for(plan, requantize, max_shard_size=max_shard_size, device=device)
        report = _requantized(screen, plan, recipe, out, command)
    else:
        check_place(plan, out)
        with interruptible(out), screen.progress() as progress:
            task = progress.add_task("merging", total=plan.weight_bytes)
            for event in merged(plan, out, command=command):
                _follow(screen, progress, task, event)
                report = event.report if isinstance(event, Merged) else report
    assert report is not None
    _draw(screen, report, out)
    if json_output:
        sys.stdout.write(json.dumps({"directory": str(out.resolve()), **asdict(report)}) + "\n")


def _require_none(options: dict[str, Any], about: str) -> None:
    from qinit.errors import RecipeError

    if given := [name for name, value in options.items() if value is not None]:
        raise RecipeError(f"{given[0]}: is about {about}")


def _follow(screen: Screen, progress: Any, task: Any, event: Any) -> None:
    from qinit.events import Done, Resumed, Working
    from qinit.words import moment

    match event:
        case Resumed(tensors, total, nbytes, since):
            progress.advance(task, nbytes)
            screen.say(f"resuming: {tensors} of {total} tensors were finished (started {moment(since)})")
        case Working(name):
            progress.update(task, description=name)
        case Done(_, nbytes, _):
            progress.advance(task, nbytes)


def _requantized(screen: Screen, plan: MergePlan, recipe: Any, out: Path, command: str) -> MergeReport | None:
    from qinit.errors import StoppedError
    from qinit.events import Checking, Done, Measuring, Noted, Passing, Resumed, Sampling, Working
    from qinit.merge.requantize import merged_place, requantize
    from qinit.merge.run import Merged
    from qinit.workplace.place import kept

    with interruptible(out), screen.progress() as progress:
        task = progress.add_task("merging", total=plan.weight_bytes)

        def told(made: Any) -> None:
            progress.reset(task, total=made.bytes_before, description="quantizing anew")

        try:
            for event in requantize(plan, recipe, out, command=command, told=told):
                match event:
                    case Merged(report, _):
                        return report
                    case Noted(text):
                        screen.say(f"note: {text}")
                    case Measuring(block, blocks, _) | Passing(block, blocks):
                        progress.update(task, description=f"block {block + 1} of {blocks}")
                    case Checking(step, at, total):
                        progress.update(task, description=f"check: {step}, {at} of {total}")
                    case Sampling(source):
                        progress.update(task, description=f"calibration text: {source}")
                    case Resumed() | Working() | Done():
                        _follow(screen, progress, task, event)
        except KeyboardInterrupt:
            place = merged_place(out)
            if place.exists() or kept(place):
                raise StoppedError(f"interrupted; {place} keeps what was merged, the same command goes on") from None
            raise
    return None


def _draw(screen: Screen, report: MergeReport, out: Path) -> None:
    from qinit_cli.draw import size

    from qinit.report.merged import merged_snippet, requantized_words

    totals = report.totals
    rows = {
        "changed": f"{len(report.merged)} parameters",
        "change, relative to Q": f"{totals['change']:.4f}",
        "lost by rounding": f"{totals['rounding']:.2e} relative to W', stored as {', '.join(totals['dtypes'])}",
        **requantized_words(report),
        "weights on disk": size(totals["bytes"]),
        "time": f"{totals['seconds']:.1f} s",
        "peak memory": size(totals["peak_memory_bytes"]),
        "written to": str(out),
    }
    screen.say(f"{report.model}: merged")
    screen.table("", "", rows=rows.items())
    screen.say("Load it:")
    for line in merged_snippet(report, str(out)):
        screen.say(f"    {line}")
