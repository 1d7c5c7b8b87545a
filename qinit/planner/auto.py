"""What `--calibration auto` becomes: decided before anything is read, by what it costs at a nominal speed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qinit.errors import CalibrationError
from qinit.machine import free_memory
from qinit.plan.limits import LARGEST_SHARE
from qinit.plan.plan import Plan
from qinit.planner.nominal import calibrating_seconds, solving_seconds
from qinit.recipe import BUNDLED, RANDOM, SELF
from qinit.solver.methods import CALIBRATED
from qinit.stream.whole import read_tokens
from qinit.text.self_text import model_bytes
from qinit.text.sources import why_unreadable
from qinit.words import duration, parse_time

LEAST_TOKENS = 8 * 512  # fewer say too little of what the layers see
# Times as many tokens of other text that make up for the model's own: on SmolLM2-135M at 2 bits twice as many gave a KL
# of .89, and its own .80.
WORTH_MORE = 8
SAVED_BY_MANY_BITS = 4  # from that width on a start without calibration is not broken
WORDS = {
    SELF: "text that the model writes itself",
    BUNDLED: "text that qinit brings",
    RANDOM: "random tokens",
}


@dataclass(frozen=True)
class Choice:
    """The source that `auto` becomes, and the reason, for people; `samples` is None where that is nothing."""

    source: str
    reason: str
    samples: int | None = None


def choose(plan: Plan, device: torch.device) -> Choice:
    """Decide `auto` for this plan: the model's own text within the budget, with fewer samples where it must be; else
    text that qinit brings; else random tokens. `none` is for methods and models that take none, and for 4 bits or more
    where even a little of it is beyond the budget."""
    needed = bool(plan.recipe.row.needs)
    if plan.recipe.method not in CALIBRATED and not needed:
        return Choice("none", f"method {plan.recipe.method} takes none")
    costs = _Costs(plan)
    unable = _cannot_write(plan, device)
    own = None if unable else costs.most(SELF)
    if own == costs.counts[0]:
        return costs.choice(SELF, own)
    other, without_text = _other_source(plan)
    if other is None and unable:
        return Choice("none", without_text)
    most = costs.most(other) if other else None
    if own and (other != BUNDLED or not most or most < WORTH_MORE * own):
        return costs.choice(SELF, own)
    notes = (unable or costs.too_long(SELF, costs.counts[0]), without_text)
    source, least = other or SELF, costs.counts[-1]
    if most is None and min(plan.recipe.widths) >= SAVED_BY_MANY_BITS and not needed:
        return Choice("none", _joined(*notes, costs.too_long(source, least), f"give --calibration {source} to have it"))
    return costs.choice(source, most or least, *notes)


class _Costs:
    """What calibration takes at nominal speed, solving included, against the budget."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.budget = plan, parse_time(plan.recipe.calibration_budget)
        self.length = plan.facts.clip(plan.recipe.calibration_length)
        asked = plan.recipe.calibration_samples
        fixed = "calibration_samples" in plan.recipe.model_fields_set
        self.counts = [asked] if fixed else _counts(asked, -(-LEAST_TOKENS // self.length))

    @property
    def _over(self) -> str:
        return f"over --calibration-budget {self.plan.recipe.calibration_budget}"

    def seconds(self, source: str, samples: int) -> float:
        return calibrating_seconds(self.plan, source, samples) + solving_seconds(self.plan, calibrated=True)

    def most(self, source: str) -> int | None:
        """Return the most samples within the budget, None where even the least are beyond it."""
        return next((count for count in self.counts if self.seconds(source, count) <= self.budget), None)

    def too_long(self, source: str, samples: int) -> str:
        """Say that so many samples are beyond the budget; nothing where they are not."""
        seconds = self.seconds(source, samples)
        if seconds <= self.budget:
            return ""
        return f"{samples} samples of {WORDS[source]} would take {duration(seconds)}, {self._over}"

    def choice(self, source: str, samples: int, *notes: str) -> Choice:
        """Return the choice of so many samples, with its size, its time, and what was not affordable."""
        seconds = self.seconds(source, samples)
        size = f"{samples} samples of {self.length} tokens ({samples * self.length})"
        said = f"on {WORDS[source]}, {size}, about {duration(seconds)} at nominal speed"
        beyond = self.too_long(source, self.counts[0]) if samples < self.counts[0] else ""
        if seconds > self.budget:
            beyond = f"{self._over}, but without any the start would be broken"
        return Choice(source, _joined(said, *notes, beyond), samples)


def _counts(asked: int, least: int) -> list[int]:
    """Return numbers of samples to try: `asked`, then three quarters, a half, three eighths and so on, down to
    `least`."""
    found, count = [asked], asked
    while count // 2 > least:
        found += [count * 3 // 4, count // 2]
        count //= 2
    return found + [least] * (least < found[-1])


def _cannot_write(plan: Plan, device: torch.device) -> str:
    """Say why the model cannot write its own text here; nothing where it can."""
    facts = plan.facts
    if not facts.writes or not _reads_tokens(plan):
        beyond = facts.causal and facts.start is not None and facts.start >= (facts.vocabulary or 0)
        why = f", as it starts with token {facts.start} of a vocabulary of {facts.vocabulary}" if beyond else ""
        return f"the model writes no text of its own{why}"
    free = free_memory(device) if plan.card is None else plan.card.memory
    needed = model_bytes(plan.bytes_before, device)
    if needed <= LARGEST_SHARE * free:
        return ""
    return (
        f"writing its own text takes {needed / 1e9:.1f} GB of the {free / 1e9:.1f} GB that are free, more "
        f"than {100 * LARGEST_SHARE:.0f} %"
    )


def _other_source(plan: Plan) -> tuple[str | None, str]:
    """Return the source beside the model's own text, None for a model that reads no tokens, and why it is not text."""
    facts, checkpoint = plan.facts, plan.checkpoint
    if facts.vocabulary is None or not _reads_tokens(plan):
        return None, "the model does not run on tokens alone"
    unreadable = why_unreadable(checkpoint.directory, facts, plan.recipe.trust_remote_code)
    return RANDOM if unreadable else BUNDLED, unreadable


def _reads_tokens(plan: Plan) -> bool:
    """Whether the model runs on token ids and nothing else: tried on its skeleton. What fails there otherwise than for
    want of another input, as for want of values, is taken for a yes."""
    assert plan.architecture.naming is not None
    try:
        with torch.no_grad():
            read_tokens(plan.architecture.naming.model, torch.zeros(1, 4, dtype=torch.int64, device="meta"), None, plan)
    except CalibrationError as error:
        return not isinstance(error.__cause__, TypeError | AttributeError | ValueError)
    return True


def _joined(*parts: str) -> str:
    return "; ".join(filter(None, parts))
