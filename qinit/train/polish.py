"""The optional polish: some hundred steps on the factors and the scales of all layers together, towards the source.

After RILQ (Lee et al. 2024, arXiv:2412.01129): its model loss, the distance between the last hidden states of the
full-precision model and of Q + B A, lets the adapters of all layers make up for one another, which no layer-wise
fit can. RILQ adds the text's own next tokens; here it is the source's next-token distribution (Hinton et al. 2015,
arXiv:1503.02531, section 2, temperature 1), so that the goal is the source and not the text. That the scales are worth
training, with the codes as they are, is EfficientQAT's second phase (Chen et al. 2024, arXiv:2407.11062, section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qinit.errors import CalibrationError, FullError, OutputError
from qinit.events import Progress
from qinit.linalg.low_rank import LowRank
from qinit.machine import free_memory, make_room, used_up
from qinit.processes.group import ALONE, Processes
from qinit.stream.feeding import inputs_of
from qinit.text.samples import Samples
from qinit.train.bases import CodedBase
from qinit.train.course import Course
from qinit.train.finetune import Training, batches
from qinit.train.outputs import observed
from qinit.train.repaired import Repaired
from qinit.train.teacher import Lessons

LEARNING_RATE = 0.005  # of the factors, relative to their entries' size
STRETCH_RATE = 0.0005  # of the scales, relative to each
BATCH_TOKENS = 1024
EPOCHS = 2  # how often a token is seen, where there is text enough
MICRO_BYTES = 1 << 28  # of the logits that are computed at once, float32
KEPT_SHARE = 0.25  # of the free memory: where activations fit, they are kept; the same numbers come out either way
HIDDEN_WEIGHT = 4.0  # nats for a relative squared error of 1
BETAS = (0.9, 0.99)
WARM_UP = 0.1  # of the steps
MAX_GRADIENT = 1.0
HELD_OUT = 8  # 1 in so many samples,
HELD_OUT_TOKENS = 4096  # at most so many tokens
EVALUATE_EVERY = 10
MOST_EVALUATIONS = 40
PATIENCE = 0.5  # of the steps without a better iterate: losses rise at high rates and fall where these come down
NOISE = 1e-6  # a smaller gain may be float32's rounding
LEAST = 1e-6  # probability: less is not told apart from nothing


@dataclass(frozen=True)
class Trained:
    """What a layer has come to: L = B A, and the scales [out, groups] of a base that has any."""

    low_rank: LowRank
    scales: torch.Tensor | None


@dataclass(frozen=True)
class Polished:
    """The layers with the lowest held-out loss. `before` and `after` are that loss at the start and with these, `steps`
    how many were made; `note` says where memory was short. `kept` False: nothing was gained and there are no layers."""

    layers: dict[str, Trained]
    steps: int
    before: float
    after: float
    note: str = ""

    @property
    def kept(self) -> bool:
        return bool(self.layers)


def polish_tokens(steps: int, seen: int) -> int:
    """Return how many tokens so many steps want where calibration has `seen` some: for EPOCHS, and some to hold out."""
    return max(steps * BATCH_TOKENS // EPOCHS, seen + HELD_OUT_TOKENS)


def polish_flops(parameters: float, tokens: int, steps: int) -> float:
    """Return about how many floating-point operations `steps` of `tokens` take, evaluations not counted.

    Per parameter and token: the student's forward 2, again 2 (where it is recomputed), its backward 2, the scales'
    gradient 2.
    """
    return 8.0 * parameters * tokens * steps


def polish(
    student: Any,
    lessons: Lessons,
    samples: Samples,
    *,
    steps: int,
    seed: int,
    state: Path | None = None,
    unseen: Collection[int] = (),
    learning_rate: float = LEARNING_RATE,
    stretch_rate: float = STRETCH_RATE,
    batch_size: int | None = None,
    processes: Processes = ALONE,
) -> Generator[Progress, None, Polished]:
    """Improve all factors and scales of a student jointly; yields Progress, first for the start (step 0) or for where
    `state` goes on, and returns Polished.

    `student` comes from `student_of`, `lessons` from `teach` with the same samples. `learning_rate` is relative to the
    size of the factors' entries and `stretch_rate` to each scale, so that they mean the same for every layer;
    `batch_size` counts samples (default: as many as have BATCH_TOKENS tokens on average). One in HELD_OUT samples, at
    most HELD_OUT_TOKENS tokens, is held out and chooses the iterate: of those whose numbers are in `unseen`, where
    there are any, as calibration has fitted the layers to all others. `seed` draws these and the batches, and the same
    seed gives the same bytes on a CPU, be it broken off or not: what it needs to go on is kept in the file `state`,
    anew at every evaluation.

    Several `processes` all call it, each with a student of its own, and come to the same: the samples go through in
    parts whose logits take MICRO_BYTES, each process takes some that follow each other, and losses and gradients are
    added up in the parts' order, as one alone adds them. The first keeps `state`, which all must see.

    Memory beside the student's: four times what is trained, for as many samples as have logits of MICRO_BYTES the
    activations at the borders of the blocks and those of one block, those of all where there is plenty of memory for
    it, and six times these logits.

    Raises CalibrationError for fewer than 2 samples, FullError where the device has no room for one. A loss that is not
    finite ends the polish; the best iterate until then counts.
    """
    if len(samples.tokens) < 2:
        raise CalibrationError(
            f"polish: {len(samples.tokens)} samples, at least 2 are needed, one to learn from and one to check on; "
            "give more or longer text"
        )
    layers = {name: module for name, module in student.named_modules() if isinstance(module, Repaired)}
    trained = _trained(layers, learning_rate, stretch_rate)
    optimizer = torch.optim.AdamW(
        [{"params": [parameter], "lr": rate} for parameter, rate in trained], betas=BETAS, weight_decay=0
    )
    course = Course([parameter for parameter, _ in trained], optimizer, state)
    text = _Text(student, lessons, samples, course.parameters, processes)
    length = samples.tokens.shape[1]
    if _kept_bytes(layers, text.size * length, student.dtype) > KEPT_SHARE * free_memory(student.device):
        enable_checkpointing(student)
    tokens = max(1, round(samples.count / len(samples.tokens)))
    batch_size = batch_size or max(1, BATCH_TOKENS // tokens)
    order = torch.randperm(len(samples.tokens), generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(1, min(len(order) // HELD_OUT, HELD_OUT_TOKENS // tokens))
    order.sort(key=lambda row: row not in unseen)  # stable
    count = min(count, len(unseen)) if unseen else count
    held_out, learned = order[:count], order[count:]
    every = max(EVALUATE_EVERY, steps // MOST_EVALUATIONS)
    resumed = course.resume()
    if len(set(processes.gather((resumed, course.step), "how far the polish is"))) > 1:
        raise OutputError(f"{state}: not all processes see it; choose a place with --out that all machines share")
    if not processes.first:
        course.file = None
    if not resumed:
        course.before = course.after = text.loss(held_out)
    yield Progress(course.step, course.after, course.after)
    plan = Training(steps=steps, length=length, batch=min(batch_size, len(learned)))
    for chosen in islice(batches(len(learned), plan, seed), course.step, None):
        if course.stale * every >= PATIENCE * steps or not math.isfinite(course.before):
            break
        loss = text.learn([learned[row] for row in chosen])
        norm = nn.utils.clip_grad_norm_(course.parameters, MAX_GRADIENT)
        if not math.isfinite(loss + float(norm)):
            break
        for group, (_, rate) in zip(optimizer.param_groups, trained, strict=True):
            group["lr"] = rate * _share(course.step, steps)
        optimizer.step()
        optimizer.zero_grad()
        course.step += 1
        now = None
        if course.step % every == 0 or course.step == steps:
            now = text.loss(held_out)
            course.judge(now)
        yield Progress(course.step, loss, now)
    if not course.before - course.after > NOISE:
        return Polished({}, course.step, course.before, course.before, text.note)
    course.restore_best()
    found = {name: _result(module) for name, module in layers.items()}
    return Polished(found, course.step, course.before, course.after, text.note)


def _trained(
    layers: Mapping[str, Repaired], learning_rate: float, stretch_rate: float
) -> list[tuple[nn.Parameter, float]]:
    """Return every parameter that is trained, with its rate."""
    found: list[tuple[nn.Parameter, float]] = []
    for module in layers.values():
        found += ((parameter, learning_rate * size) for parameter, size in module.sizes())
        if isinstance(module.base, CodedBase):
            found.append((module.base.stretch, stretch_rate))
    return found


def _result(module: Repaired) -> Trained:
    assert module.B is not None
    assert module.A is not None
    scales = module.base.stretched() if isinstance(module.base, CodedBase) else None
    return Trained(LowRank(module.B.detach().cpu(), module.A.detach().cpu()), None if scales is None else scales.cpu())


def _share(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to 0; as a part of the learning rate, for the step after `step`."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


class _Text:
    """The samples, run through the student in parts whose logits take MICRO_BYTES, and compared with the lessons where
    nothing is padded."""

    def __init__(
        self,
        student: Any,
        lessons: Lessons,
        samples: Samples,
        parameters: Sequence[nn.Parameter],
        processes: Processes,
    ) -> None:
        self.student, self.lessons, self.samples = student, lessons, samples
        self.parameters, self.processes = parameters, processes
        vocabulary = getattr(student.config.get_text_config(), "vocab_size", None) or 1
        fitting = MICRO_BYTES // (4 * vocabulary * samples.tokens.shape[1])
        self.size = max(1, min(len(samples.tokens), fitting))
        self.note = ""

    def learn(self, rows: Sequence[int]) -> float:
        """Return the mean loss over the samples `rows`, and leave its gradients, which nothing is added to."""
        return self._in_room(rows, backward=True)

    @torch.no_grad()
    def loss(self, rows: Sequence[int]) -> float:
        return self._in_room(rows, backward=False)

    def _in_room(self, rows: Sequence[int], *, backward: bool) -> float:
        """Return the loss, with fewer samples at once from where the device has no room for as many. Raises
        FullError."""
        while True:
            try:
                return self._added_up(rows, backward=backward)
            except (torch.OutOfMemoryError, FullError):
                pass  # with the error go the tensors of what has failed
            self.student.zero_grad()
            make_room()
            full = used_up("polish", self.student.device, self.size)
            self.processes.recover(FullError(full))
            if self.size == 1:
                raise FullError(f"{full}; give it shorter text (--calibration-length), or use --device cpu")
            self.size //= 2
            self.note = f"{full}, so it is done with {self.size} at once"

    def _added_up(self, rows: Sequence[int], *, backward: bool) -> float:
        """Return the loss of all parts, of which each process takes some."""
        starts, processes = range(0, len(rows), self.size), self.processes
        if not processes.several:
            return sum(self._parts(rows, starts, backward=backward))
        first, last = (len(starts) * rank // processes.count for rank in (processes.rank, processes.rank + 1))
        losses: list[float] = []
        gradients: list[list[torch.Tensor | None]] = []
        for loss in self._parts(rows, starts[first:last], backward=backward):
            losses.append(loss)
            gradients.append([parameter.grad for parameter in self.parameters])
            self.student.zero_grad()
        reached = {place for part in gradients for place, own in enumerate(part) if own is not None}
        shares = processes.gather((losses, reached), "losses")
        if backward:
            self._add_up(sorted(set().union(*(places for _, places in shares))), gradients)
        return sum(loss for losses, _ in shares for loss in losses)

    def _add_up(self, places: Sequence[int], gradients: Sequence[Sequence[torch.Tensor | None]]) -> None:
        """Give the parameters at these places the gradients of all parts, added one after the other."""
        total = [torch.zeros_like(self.parameters[place], requires_grad=False) for place in places]

        def add(number: int) -> None:
            for part in gradients:
                if (own := part[places[number]]) is not None:
                    total[number].add_(own)

        if self.processes.first:
            for number in range(len(places)):
                add(number)
        self.processes.chain(total, add, "gradients")
        for place, gradient in zip(places, total, strict=True):
            self.parameters[place].grad = gradient

    def _parts(self, rows: Sequence[int], starts: Sequence[int], *, backward: bool) -> Iterator[float]:
        """Yield the loss of each of the parts of `rows` that start there, and leave its gradients."""
        device, tiny = self.student.device, torch.finfo(torch.float32).tiny
        lesson, mask = self.lessons.of(rows, device), self._mask(rows).to(device)
        tokens = max(1, int(mask.sum()))
        energy = lesson.hidden[mask].square().sum().clamp(min=tiny)
        for at in starts:
            part = slice(at, at + self.size)
            ids = self.samples.tokens[list(rows[part])].to(device)
            inputs = inputs_of(self.student, ids, mask[part].long())
            hidden, logits = observed(self.student, partial(self.student, **inputs))
            found, wanted = hidden[mask[part]].float(), lesson.hidden[part][mask[part]]
            loss = HIDDEN_WEIGHT * (found - wanted).square().sum() / energy
            if logits is not None and lesson.log_probs is not None and lesson.ids is not None:
                chosen = mask[part]
                kl = divergence(logits[chosen], lesson.log_probs[part][chosen], lesson.ids[part][chosen])
                loss = loss + kl.sum() / tokens
            if backward:
                loss.backward()
            yield float(loss.detach())

    def _mask(self, rows: Sequence[int]) -> torch.Tensor:
        if self.samples.mask is None:
            return torch.ones((len(rows), self.samples.tokens.shape[1]), dtype=torch.bool)
        return self.samples.mask[list(rows)]


def divergence(logits: torch.Tensor, log_probs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher || student) in nats [tokens] from the student's logits [tokens, vocabulary] and the teacher's
    largest log-probabilities [tokens, k] of the tokens `ids`. All other tokens count as one: a lower bound of the whole
    KL, and equal to it where k is the vocabulary."""
    found = logits.float().log_softmax(-1).gather(-1, ids)
    wanted = log_probs.exp()
    kl = (wanted * (log_probs - found)).sum(-1)
    rest, found_rest = ((1 - part.sum(-1)).clamp(min=LEAST) for part in (wanted, found.exp()))
    return kl + rest * (rest.log() - found_rest.log()) if ids.shape[-1] < logits.shape[-1] else kl


def _kept_bytes(layers: Mapping[str, Repaired], tokens: int, dtype: torch.dtype) -> int:
    """Return about what a pass forward keeps of its activations: what the layers read and write, and as much between
    them."""
    widths = sum(sum(module.base.shape) for module in layers.values())
    return 2 * widths * tokens * dtype.itemsize


def enable_checkpointing(student: Any) -> None:
    """Let the blocks be computed again in the pass back, where the model can; all else stays in eval mode."""
    if not student.supports_gradient_checkpointing:
        return
    # Its name before transformers 5.
    enable = getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
    enable({"use_reentrant": False, "preserve_rng_state": False})
    for module in student.modules():  # only these look whether they are trained
        module.training = bool(getattr(module, "gradient_checkpointing", False))
