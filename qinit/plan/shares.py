"""What of a model stays as it is, in weights and bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # reports are drawn without torch
    from qinit.files.tensors import StoredTensor
    from qinit.source.checkpoint import Checkpoint
    from qinit.source.targets import Architecture

EXPERTS, EMBEDDINGS, LINEAR, OTHERS = "experts", "embeddings and head", "linear layers", "all else"


@dataclass(frozen=True)
class Share:
    """A part of the model that is not quantized: `weights` of them, in `nbytes`."""

    what: str
    weights: int
    nbytes: int

    @property
    def bits(self) -> int:
        """The bits that a weight of it takes."""
        return 8 * self.nbytes // self.weights

    def words(self, model: int) -> str:
        """Say how large it is, and what part of a model of so many weights."""
        size, part = _size(self.nbytes), 100 * self.weights / model
        return f"{self.what}: {_count(self.weights)} weights, {size}, {part:.0f} % of the model"

    def to_json(self) -> dict[str, Any]:
        return {"what": self.what, "weights": self.weights, "bytes": self.nbytes}


def shares_of(checkpoint: Checkpoint, architecture: Architecture, left: Iterable[StoredTensor]) -> tuple[Share, ...]:
    """Return what tensors (of slices of one, NAME[i]) hold by kind, the largest part first."""
    kinds = _kinds(checkpoint, architecture)
    found: dict[str, tuple[int, int]] = {}
    for tensor in left:
        kind = kinds.get(tensor.name) or kinds.get(tensor.name.rpartition("[")[0]) or OTHERS
        weights, nbytes = found.get(kind, (0, 0))
        found[kind] = weights + tensor.numel, nbytes + tensor.nbytes
    shares = (Share(kind, *sizes) for kind, sizes in found.items() if sizes[0])
    return tuple(sorted(shares, key=lambda share: -share.weights))


def weight_words(quantized: int, model: int, left: list[dict[str, Any]], what: str = "quantized") -> dict[str, str]:
    """Return a table's rows on how many of a model's weights are quantized (or `what` else), and the largest part that
    is not, from `Share.to_json` of each part."""
    rows = {"weights": f"{_count(quantized)} of {_count(model)} {what}, {100 * quantized / model:.0f} %"}
    if left:
        share = Share(str(left[0]["what"]), int(left[0]["weights"]), int(left[0]["bytes"]))
        rows[f"stays in {share.bits} bits"] = share.words(model)
    return rows


def _count(weights: int) -> str:
    return f"{weights:.3g}".replace("e+0", "e").replace("e+", "e")


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2g} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2g} MB"


def _kinds(checkpoint: Checkpoint, architecture: Architecture) -> dict[str, str]:
    """Return what kind of weights the checkpoint's tensors hold, by name; of slices that of the whole."""
    kinds: dict[str, str] = {}
    names = architecture.names_in(checkpoint)
    heads = [] if architecture.head is None else [architecture.head.parameter]
    known = dict.fromkeys((*architecture.embeddings, *heads), EMBEDDINGS)
    for parameter, kind in (known | {module.parameter: LINEAR for module in architecture.linear}).items():
        tensor = names.find(parameter)
        kinds |= dict.fromkeys(names.made_of(parameter) if tensor is None else [tensor.name], kind)
    for stack in architecture.stacks:
        parts = {name for names in stack.sources for name in names} or {stack.name}
        kinds |= dict.fromkeys(parts | {name.rpartition("[")[0] for name in parts if "[" in name}, EXPERTS)
    return kinds
