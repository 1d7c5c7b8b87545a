"""Which modules the loader packs, and how config.json names just those that are.

`packed` is the rule of optimum's GPTQQuantizer.convert_model, which transformers calls before it loads weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

# Block names that optimum finds by itself, whether a base model or one with a head is loaded.
KNOWN_BLOCKS = (
    "transformer.h",
    "model.decoder.layers",
    "gpt_neox.layers",
    "model.layers",
    "h",
    "decoder.layers",
    "layers",
)
# It takes the first of these that any module's name begins with; the one that is not above is new in optimum 2.
BLOCKS_IN_ORDER = (*KNOWN_BLOCKS[:4], "model.language_model.layers", *KNOWN_BLOCKS[4:])


def is_replaced(kind: type) -> bool:
    """Whether the loader packs modules of this class: nn.Linear itself and no subclass, as those compute otherwise;
    Conv1D and nn.Conv2d."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return kind is nn.Linear or issubclass(kind, (Conv1D, nn.Conv2d))


def is_reached(name: str) -> bool:
    """Whether the loader comes by a module of this name: it goes through dir(parent), and nn.Module's leaves out names
    that begin with a digit, as those of linear layers that stand in a list or a sequence themselves."""
    return not name.rpartition(".")[2][:1].isdigit()


def packed(modules: Mapping[str, type], config: Mapping[str, Any]) -> set[str]:
    """Return the names of the modules, of a model's classes by name, that the loader packs for a
    `quantization_config`."""
    block = config.get("block_name_to_quantize")
    if block is None:
        block = _found_block(modules)
    endings = tuple(ending for group in config["modules_in_block_to_quantize"] for ending in group)
    if block is None:
        return set()
    chosen = {name: kind for name, kind in modules.items() if name.startswith(block) and name.endswith(endings)}
    return {name for name, kind in chosen.items() if is_replaced(kind) and is_reached(name)}


def block_to_name(quantized: Collection[str], modules: Iterable[str]) -> str | None:
    """Return the block that config.json has to name: what all `quantized` names share up to the layer number. None
    where optimum finds it by itself among a model's `modules`."""
    block = shared_block(quantized)
    found = _found_block(modules) or block
    return None if block in KNOWN_BLOCKS and found == block else block


def selectors(quantized: Iterable[str], others: Collection[str]) -> list[str]:
    """Return endings that select just the quantized modules: the loader matches names by `endswith`.

    An ending below the layer number serves all layers; where there is none, or it would catch one of the `others`, full
    names do.
    """
    found: dict[str, None] = {}
    clashes: dict[str, bool] = {}
    for name in quantized:
        parts = name.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        below = parts[numbers[0] + 1 :] if numbers else []
        ending = "." + ".".join(below) if below else name
        if ending not in clashes:
            clashes[ending] = any(other.endswith(ending) for other in others)
        found[name if clashes[ending] else ending] = None
    return list(found)


def _found_block(modules: Iterable[str]) -> str | None:
    names = list(modules)
    return next((block for block in BLOCKS_IN_ORDER if any(name.startswith(block) for name in names)), None)


def shared_block(names: Collection[str]) -> str:
    """The dotted prefix that all names share up to the layer number: `model.layers`."""
    shared = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1 or parts[0].isdigit():
            break
        shared.append(parts[0])
    return ".".join(shared)
