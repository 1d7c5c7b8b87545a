"""What a run has written, looked at as stock transformers and PEFT look at it, before it takes its place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qinit.errors import CheckpointError
from qinit.events import Event
from qinit.runner.job import Job
from qinit.source.skeleton import loader
from qinit.trial.names import lost_names

LOST = "check: stock loaders would lose a part of it: "  # what the note begins with


def check_names(job: Job) -> Iterator[Event]:
    """Let them look for every name that was written, on the meta device, unless the recipe asks for no check; notes say
    what they would not find. It reads no weight and needs no package to unpack any."""
    plan, run = job.plan, job.place.run
    if not plan.recipe.check:
        return
    source, trusted = plan.checkpoint, plan.recipe.trust_remote_code
    base = run if plan.given is None else source.directory  # of a base by others it is the adapter that is looked at
    try:
        problems = lost_names(
            base,
            plan.adapter_directory(run),
            source.directory,
            loader(source.config, trusted).__name__,
            trust_remote_code=trusted,
        )
    except CheckpointError as error:
        problems = [str(error).replace(str(run), "the run").replace(str(source.directory), "the model")]
    for problem in problems:
        yield job.note(f"{LOST}{problem}")


def is_lost(notes: Iterable[str]) -> bool:
    """Whether a run's notes say that stock loaders do not find all of it."""
    return any(note.startswith(LOST) for note in notes)
