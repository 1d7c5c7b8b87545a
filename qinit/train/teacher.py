"""What the full-precision model makes of a text, kept on disk, so that it need not be in memory beside what learns from
it: of every token the last hidden state and the most likely next tokens."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.nn.functional import pad

from qinit.calibration.activations import batch_size
from qinit.errors import CalibrationError
from qinit.events import Reading
from qinit.files.tensors import StoredTensor, TensorSpec, read_header
from qinit.files.writer import SafetensorsWriter
from qinit.plan.plan import Plan
from qinit.steps import told
from qinit.stream.blocks import Blocks
from qinit.stream.calls import NotStreamable
from qinit.stream.carried import Batch, batches_of
from qinit.stream.front import ends_of
from qinit.stream.reading import read_through
from qinit.stream.whole import load_whole, read_tokens
from qinit.text.samples import Portion, Samples
from qinit.train.outputs import observed

TOP = 64  # next tokens that are kept
SHARD_BYTES = 1 << 28
STEM = "teacher"
LOGITS_BYTES = 1 << 28  # of one batch, float32
PARTS = ("hidden", "log_probs", "ids")


@dataclass(frozen=True)
class Lesson:
    """The teacher's outputs for some samples: the last hidden states [samples, length, width], float32, and of the next
    token the TOP largest log-probabilities [samples, length, TOP] and their ids; None for a model without a head."""

    hidden: torch.Tensor
    log_probs: torch.Tensor | None
    ids: torch.Tensor | None


class Lessons:
    """The teacher's outputs for all samples of a text, in `directory`, read as they are asked for."""

    def __init__(self, directory: Path) -> None:
        self.tensors: dict[str, StoredTensor] = {}
        for file in sorted(directory.glob(f"{STEM}*.safetensors")):
            self.tensors |= read_header(file)

    def __len__(self) -> int:
        """How many samples there are."""
        return sum(name.endswith(".hidden") for name in self.tensors)

    def of(self, rows: Sequence[int], device: torch.device) -> Lesson:
        """Return the outputs for the samples of these numbers, in their order."""
        parts = {part: [self.tensors.get(f"{row}.{part}") for row in rows] for part in PARTS}
        found = {
            part: torch.stack([tensor.read() for tensor in tensors if tensor is not None]).to(device)
            for part, tensors in parts.items()
            if tensors[0] is not None
        }
        if "ids" not in found:
            return Lesson(found["hidden"].float(), None, None)
        return Lesson(found["hidden"].float(), found["log_probs"].float(), found["ids"].long())


def teach(
    plan: Plan, samples: Samples, device: torch.device, directory: Path, scratch: Path, portion: Portion = int
) -> Generator[Reading, None, Lessons]:
    """Run the source over the text, block by block, and keep what it makes of it in `directory`; a model that cannot be
    run so is loaded whole, in float32. `scratch` holds the hidden states between two blocks where memory is short.

    On disk: 2 bytes for each entry of a hidden state and 6 for each of TOP next tokens.
    Raises CalibrationError for a model that does not run on tokens, or whose outputs are NaN or Inf.
    """
    directory.mkdir(exist_ok=True)
    vocabulary = plan.facts.vocabulary or 1
    size = min(batch_size(plan, samples, device), max(1, LOGITS_BYTES // (4 * vocabulary * samples.tokens.shape[1])))
    batches = list(batches_of(samples, portion(size)))
    try:
        yield from _streamed(plan, samples, batches, device, directory, scratch)
    except NotStreamable:
        _whole(plan, samples, batches, device, directory)
    return Lessons(directory)


def _streamed(
    plan: Plan, samples: Samples, batches: list[Batch], device: torch.device, directory: Path, scratch: Path
) -> Iterator[Reading]:
    blocks = Blocks.of(plan, device)
    blocks.require_whole()
    count = sum(map(len, blocks.rows))
    with TemporaryDirectory(dir=scratch, prefix="teacher-states-") as place:
        steps = read_through(blocks, samples.tokens, batches, Path(place) / "states")
        ends = yield from told(steps, lambda done: Reading(done, count))
        keep = _Keeper(directory, samples)
        with blocks.surroundings(head=True), torch.no_grad():
            for batch in batches:
                run = partial(blocks.after, batch.of(samples.tokens), batch.long_mask, ends_of(batch, ends, device))
                keep.add(batch, *observed(blocks.model, run))
        keep.close()


def _whole(plan: Plan, samples: Samples, batches: list[Batch], device: torch.device, directory: Path) -> None:
    model = load_whole(plan).to(device)
    keep = _Keeper(directory, samples)
    with torch.no_grad():
        for batch in batches:
            mask = None if batch.mask is None else batch.mask.to(device)
            tokens = batch.of(samples.tokens).to(device)
            keep.add(batch, *observed(model, partial(read_tokens, model, tokens, mask, plan)))
    keep.close()


class _Keeper:
    """Writes outputs as they come."""

    def __init__(self, directory: Path, samples: Samples) -> None:
        self.directory, self.samples = directory, samples
        self.writer: SafetensorsWriter | None = None

    def add(self, batch: Batch, hidden: torch.Tensor, logits: torch.Tensor | None) -> None:
        tensors = {"hidden": hidden.bfloat16()}  # float16 would overflow in some models
        if logits is not None:
            top = logits.float().log_softmax(-1).topk(min(TOP, logits.shape[-1]), dim=-1)
            tensors |= {"log_probs": top.values.half(), "ids": top.indices.int()}
        if not all(bool(torch.isfinite(tensors[part]).all()) for part in tensors if part != "ids"):
            raise CalibrationError(
                f"the source's outputs for samples {batch.start + 1} to {batch.stop} of the text "
                f"({self.samples.origin}) are NaN or Inf; its weights are damaged, or overflow there: try other text"
            )
        count, length = self.samples.tokens.shape
        tensors = {part: pad(value, (0, 0, 0, length - value.shape[1])) for part, value in tensors.items()}
        if self.writer is None:
            specs = [
                TensorSpec(f"{row}.{part}", value.dtype, tuple(value.shape[1:]))
                for row in range(count)
                for part, value in tensors.items()
            ]
            self.writer = SafetensorsWriter(self.directory, specs, stem=STEM, max_bytes=SHARD_BYTES)
        for part, value in tensors.items():
            for row, one in zip(range(batch.start, batch.stop), value.cpu(), strict=True):
                self.writer.write(f"{row}.{part}", one.contiguous())

    def close(self) -> None:
        assert self.writer is not None
        self.writer.close()
