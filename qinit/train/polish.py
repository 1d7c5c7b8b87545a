"""The optional polish: a few hundred steps on the LoRA factors of all layers together, towards the source model.

After RILQ (Lee et al. 2024, arXiv:2412.01129): its model loss, the distance between the last hidden states of the
full-precision model and of Q + B A, lets the adapters of all layers make up for one another, which no layer-wise
fit can. RILQ adds the text's own next tokens; here it is the source's whole next-token distribution (Hinton et al.
2015, arXiv:1503.02531, section 2, temperature 1), so that the goal is the source and not the text.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from qinit.errors import CalibrationError, CheckpointError
from qinit.events import Progress
from qinit.linalg.low_rank import LowRank
from qinit.source.quiet import no_progress_bar
from qinit.source.skeleton import loader
from qinit.text.samples import Samples
from qinit.train.repaired import _make_student

# Chosen on a 260K-parameter Llama at 2 bits by held-out loss and by the KL on fresh text that the model wrote.
LEARNING_RATE = 0.015
BATCH_TOKENS = 2048
HIDDEN_WEIGHT = 4.0  # nats for a relative squared error of 1
BETAS = (0.9, 0.99)
WARM_UP = 0.1  # of the steps
MAX_GRADIENT = 1.0
HELD_OUT = 8  # 1 in so many samples
EVALUATE_EVERY = 10
PATIENCE = 5  # evaluations
NOISE = 1e-6  # a smaller gain may be float32's rounding


@dataclass(frozen=True)
class Polished:
    """The factors with the lowest held-out loss. `before` and `after` are that loss at the start and with these
    factors, `steps` how many were made. `kept` False: nothing was gained and the factors are the ones given."""

    factors: dict[str, LowRank]
    steps: int
    before: float
    after: float
    kept: bool


def polish_flops(parameters: int, samples_tokens_per_step: int, steps: int) -> float:
    """Return about how many floating-point operations a polish takes, evaluations not counted.

    Per parameter and token: the source's forward 2, the student's 2, again 2 (recomputed), its backward 4.
    """
    return 10.0 * parameters * samples_tokens_per_step * steps


def polish(
    directory: Path,
    config: dict[str, Any],
    bases: dict[str, torch.Tensor],
    factors: dict[str, LowRank],
    samples: Samples,
    *,
    steps: int,
    device: torch.device,
    seed: int,
    learning_rate: float = LEARNING_RATE,
    batch_size: int | None = None,
    trust_remote_code: bool = False,
) -> Generator[Progress, None, Polished]:
    """Improve the factors jointly; yields Progress, first for the start (step 0), and returns Polished.

    `directory` and `config` are the source checkpoint and its config.json. `bases` maps module names to
    Q [out, in], `factors` to B [out, r] and A [r, in] unscaled, r <= min(out, in). A module with a base alone runs
    on Q, one with factors alone on its own weight. `learning_rate` is relative to the size of the factors' entries,
    so that it means the same for every layer, for A and for B; `batch_size` counts samples (default: BATCH_TOKENS
    tokens). One in HELD_OUT samples is held out and chooses the iterate; `seed` draws these and the batches, and
    the same seed gives the same bytes on a CPU.

    Memory: the whole source in float32 once, plus Q of every target in its dtype, five times the factors (gradients,
    two moments, the best iterate), and for one batch the activations at the borders of the blocks and about six
    times the logits [batch, length, vocabulary] in float32. On a CPU it is sensible for small models only.

    Raises CalibrationError for fewer than 2 samples and CheckpointError if the source cannot be loaded. A loss that
    is not finite ends the polish; the best iterate until then counts.
    """
    if len(samples.tokens) < 2:
        raise CalibrationError(
            f"polish: {len(samples.tokens)} samples, at least 2 are needed, one to learn from and one to check on; "
            "give more or longer text"
        )
    teacher = _load(directory, config, trust_remote_code).to(device)
    student = _make_student(teacher, bases, factors, device)
    repaired = {name: student.get_submodule(name) for name in factors}
    optimizer = torch.optim.AdamW(
        [group for module in repaired.values() for group in module.groups(learning_rate)], betas=BETAS, weight_decay=0
    )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    batch_size = batch_size or max(1, BATCH_TOKENS // samples.tokens.shape[1])

    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(samples.tokens), generator=generator)
    held_out, train = order.tensor_split([max(1, len(order) // HELD_OUT)])
    queue = train[:0]
    before = after = _evaluate(teacher, student, samples, held_out, batch_size)
    best = [parameter.detach().clone() for parameter in parameters]
    yield Progress(0, before, before)
    step = stale = 0
    while step < steps and stale < PATIENCE and math.isfinite(before):
        while len(queue) < min(batch_size, len(train)):
            queue = torch.cat([queue, train[torch.randperm(len(train), generator=generator)]])
        rows, queue = queue.split([min(batch_size, len(train)), len(queue) - min(batch_size, len(train))])
        loss = _terms(teacher, student, samples, rows).loss()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT)
        if not torch.isfinite(loss + norm):
            break
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        step += 1
        now = None
        if step % EVALUATE_EVERY == 0 or step == steps:
            now = _evaluate(teacher, student, samples, held_out, batch_size)
            stale += 1
            if now < after:
                after, stale = now, 0
                for kept, parameter in zip(best, parameters, strict=True):
                    kept.copy_(parameter.detach())
        yield Progress(step, float(loss.detach()), now)
    if not before - after > NOISE:
        return Polished(factors, step, before, before, kept=False)
    values = iter(best)
    polished = {}
    for name, low_rank in factors.items():
        B, A = next(values), next(values)
        polished[name] = LowRank(B.to(low_rank.B), A.to(low_rank.A))
    return Polished(polished, step, before, after, kept=True)


@dataclass
class _Terms:
    """Sums over tokens: nats of KL(teacher || student), squared error and squared norm of the last hidden state."""

    kl: torch.Tensor
    error: torch.Tensor
    energy: torch.Tensor
    tokens: torch.Tensor

    def loss(self) -> torch.Tensor:
        tiny = torch.finfo(torch.float32).tiny
        return self.kl / self.tokens.clamp(min=1) + HIDDEN_WEIGHT * self.error / self.energy.clamp(min=tiny)


def _terms(teacher: Any, student: Any, samples: Samples, rows: torch.Tensor) -> _Terms:
    """Run both models on the samples `rows` and compare them where nothing is padded."""
    tokens = samples.tokens[rows].to(teacher.device)
    mask = torch.ones_like(tokens, dtype=torch.bool) if samples.mask is None else samples.mask[rows].to(tokens.device)
    with torch.no_grad():
        wanted, wanted_logits = _outputs(teacher, tokens, mask)
    hidden, logits = _outputs(student, tokens, mask)
    kl = torch.zeros((), device=tokens.device)
    if logits is not None and wanted_logits is not None:
        wanted_log = functional.log_softmax(wanted_logits[mask].float(), -1)
        found_log = functional.log_softmax(logits[mask].float(), -1)
        kl = functional.kl_div(found_log, wanted_log, reduction="sum", log_target=True)
    wanted, hidden = wanted[mask].float(), hidden[mask].float()
    return _Terms(kl, (hidden - wanted).square().sum(), wanted.square().sum(), mask.sum())


@torch.no_grad()
def _evaluate(teacher: Any, student: Any, samples: Samples, rows: torch.Tensor, batch_size: int) -> float:
    """Return the loss over all tokens of the samples `rows`."""
    terms = [_terms(teacher, student, samples, batch) for batch in rows.split(batch_size)]
    sums = (sum(vars(part)[name] for part in terms) for name in ("kl", "error", "energy", "tokens"))
    return float(_Terms(*sums).loss())  # type: ignore[arg-type]


def _outputs(model: Any, tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the last hidden state [batch, length, width] and the logits [batch, length, vocabulary], if any."""
    head, seen = model.get_output_embeddings(), []
    if head is not None:
        hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    else:
        hook = model.base_model.register_forward_hook(lambda _, inputs, outputs: seen.append(outputs[0]))
    decoder = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    try:
        outputs = model(input_ids=tokens, attention_mask=mask.long(), **decoder)
    finally:
        hook.remove()
    return seen[0], None if head is None else outputs.logits


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to 0; as a part of the learning rate, for the step after `step`."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _load(directory: Path, config: dict[str, Any], trust_remote_code: bool = False) -> Any:
    """Load the source in float32, frozen, in eval mode, with every dropout and the key-value cache off."""
    import transformers

    try:
        model_config = transformers.AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust_remote_code
        )
        for part in {id(part): part for part in (model_config, model_config.get_text_config())}.values():
            part.use_cache = False
            for key, value in vars(part).items():
                if "drop" in key and isinstance(value, float):
                    setattr(part, key, 0.0)
        with no_progress_bar():
            model = loader(config, trust_remote_code).from_pretrained(
                directory,
                config=model_config,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:  # a checkpoint can break its class in any way
        reason = str(error).split("\n")[0]
        raise CheckpointError(
            f"{directory}: the source cannot be loaded for the polish ({type(error).__name__}: {reason})"
        ) from error
    return model.eval().requires_grad_(False)
