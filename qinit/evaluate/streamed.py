"""Logits of a model that is larger than memory: one block of it at a time, over all windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from qinit.adapters.reading import SavedAdapter
from qinit.errors import CheckpointError
from qinit.evaluate.figures import Logits
from qinit.evaluate.subject import Subject
from qinit.evaluate.windows import Windows
from qinit.formats import format_of
from qinit.source.checkpoint import Checkpoint
from qinit.source.targets import read_architecture
from qinit.steps import told
from qinit.stream.blocks import Blocks
from qinit.stream.calls import NotStreamable
from qinit.stream.carried import Batch, Carried
from qinit.stream.feeding import reads_twice
from qinit.stream.reading import read_through
from qinit.stream.weights import ModelWeights


@dataclass(frozen=True)
class Block:
    """A block of a model has read all windows; `done` of `blocks`."""

    model: str
    done: int
    blocks: int


class Streamed:
    """A model whose blocks are in memory one after the other, in float32, with Q + s B A as their weights.

    Raises NotStreamable for a model that is no rows of blocks, for an encoder-decoder, which predicts no next token of
    the text that it reads, and for weights that are stored in another way.
    """

    def __init__(self, subject: Subject, windows: Windows, batch_size: int, device: torch.device) -> None:
        self.name, self.windows, self.device = subject.name, windows, device
        self.blocks = Blocks(_weights(subject), device)
        self.blocks.require_whole()
        if reads_twice(self.blocks.model):
            raise NotStreamable("an encoder-decoder predicts no next token of the text that it reads")
        self.count = sum(map(len, self.blocks.rows))
        count = len(windows)
        self.batches = [Batch(at, min(at + batch_size, count), None) for at in range(0, count, batch_size)]
        self.ends: list[Carried | None] | None = None

    def read(self, file: Path, streams: int) -> Iterator[Block]:
        """Carry the hidden states of all windows through all blocks; `file` holds them where memory is short, as one of
        `streams` such stores."""
        steps = read_through(self.blocks, self.windows.tokens, self.batches, file, streams)
        self.ends = yield from told(steps, lambda done: Block(self.name, done, self.count))

    def logits(self) -> Logits:
        """Return what gives the logits once all has been read; the head must be in memory (`blocks.surroundings`)."""

        def run(rows: slice) -> torch.Tensor:
            assert self.ends is not None
            states = [None if end is None else end.states[rows].to(self.device) for end in self.ends]
            return self.blocks.after(self.windows.tokens[rows], None, states).logits

        return run


def _weights(subject: Subject) -> ModelWeights:
    checkpoint = Checkpoint.open(subject.base, quantized=True)
    fmt = format_of(checkpoint.config)
    if fmt is None:
        how = checkpoint.config["quantization_config"].get("quant_method")
        raise NotStreamable(f"its weights are packed as {how}, which is not read layer by layer")
    if (problem := fmt.cannot_read(checkpoint.config)) is not None:
        raise NotStreamable(f"its weights are packed as {problem}")
    architecture = read_architecture(checkpoint, subject.trust_remote_code)
    adapter = None
    if subject.adapter is not None:
        try:
            adapter = SavedAdapter.open(subject.adapter)
        except CheckpointError as error:
            raise NotStreamable(str(error)) from error
        other = adapter.parts.keys() - {adapter.kind.stack_of(module) for module in architecture.modules.values()}
        if other:
            raise NotStreamable(f"{subject.adapter}: has factors for {min(other)}, which is no linear layer inside")
    return ModelWeights(checkpoint, architecture, adapter=adapter, trust_remote_code=subject.trust_remote_code)
