"""What the plan of a run has of layers, modules and parameters."""

from __future__ import annotations

from dataclasses import dataclass

from qinit.files.tensors import StoredTensor, TensorSpec
from qinit.source.checkpoint import Checkpoint
from qinit.source.targets import Architecture, Target


@dataclass(frozen=True)
class LayerPlan:
    """One selected layer: quantized, or kept as it is for a reason (its adapter is then a plain LoRA start)."""

    target: Target
    bits: int
    group_size: int
    rank: int
    kept: str | None
    specs: tuple[TensorSpec, ...]  # what stands in the base for this layer's weight

    @property
    def weights(self) -> int:
        return self.target.numel

    @property
    def bytes_after(self) -> int:
        return sum(spec.nbytes for spec in self.specs)


@dataclass(frozen=True)
class Left:
    """A chosen module that stays as it is and gets no adapter, and why."""

    target: Target
    reason: str


@dataclass(frozen=True)
class Whole:
    """A parameter that PEFT trains whole, as those of a head: its name in the adapter's file, and what it starts as."""

    name: str
    tensor: StoredTensor


@dataclass(frozen=True)
class Given:
    """A base that exists, to be repaired and not written: its checkpoint, and its model as that describes it."""

    checkpoint: Checkpoint
    architecture: Architecture
    form: str  # the name of what reads it
    moved: frozenset[str] = frozenset()  # parameters of the source that are brought into the base's coordinates
