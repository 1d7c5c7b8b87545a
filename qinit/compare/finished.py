"""A row that starts from a finished run, as `qinit eqft` or `qinit polish` has left it: nothing is solved anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qinit.compare.comparison import Row
from qinit.compare.stored import bits_as_stored
from qinit.errors import CheckpointError, ReportError
from qinit.files.manifest import bytes_sum
from qinit.planner.again import plan_again, recipe_of
from qinit.runner.before import Before
from qinit.source.checkpoint import Checkpoint


def finished_row(directory: Path, checkpoint: Checkpoint, rates: Sequence[float], trust_remote_code: bool) -> Row:
    """Return the row of a run, which is called as its directory is.

    Raises ReportError for what is no finished run, is damaged, or has a trained adapter, and CheckpointError for a run
    of another model than `checkpoint`, as far as headers and configuration show it.
    """
    try:
        before = Before.open(directory)
        recipe = recipe_of(before.report, directory, trust_remote_code=trust_remote_code)
        untouched = recipe.model_copy(update={"calibration": "none"})  # its text may be gone, and is not read
        plan = plan_again(before.report, untouched, directory, checkpoint.directory)
    except (ReportError, CheckpointError) as error:
        raise type(error)(f"--run: {error}") from None
    bits = before.report.totals["nominal_bits"]
    return Row(
        directory.resolve().name,
        int(bits) if bits == int(bits) else bits,
        recipe,
        tuple(rates),
        bits_as_stored(plan),
        run=directory,
        sums=bytes_sum(before.identity.encode()),
    )
