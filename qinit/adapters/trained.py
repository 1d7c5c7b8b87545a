"""An adapter that a trainer has saved: whether it fits the base of the run that it was trained on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qinit.adapters.base import CONFIG_NAME, PREFIX, WEIGHTS_STEM, Adapter
from qinit.adapters.reading import kind_of
from qinit.errors import CheckpointError
from qinit.files.tensors import StoredTensor, read_header
from qinit.source.checkpoint import read_json
from qinit.source.targets import LinearModule

WEIGHTS_NAME = f"{WEIGHTS_STEM}.safetensors"


def read_trained(adapter: Path) -> dict[str, Any]:
    """Return the configuration of a saved adapter. Raises CheckpointError for a directory that holds none whole, with
    what there is instead, and for one with which PEFT would run code."""
    below = sorted(path.parent.name for path in adapter.glob(f"*/{CONFIG_NAME}"))
    hint = f"an adapter's directory has one{f', as {below[-1]} below it has' if below else ''}"
    config = read_json(adapter / CONFIG_NAME, hint)
    if not (adapter / WEIGHTS_NAME).is_file():
        pickled = (adapter / f"{WEIGHTS_STEM}.bin").is_file()
        advice = "save it again as safetensors: the pickle there can run code when read" if pickled else hint
        raise CheckpointError(f"{adapter / WEIGHTS_NAME}: not found; {advice}")
    if config.get("megatron_config"):
        raise CheckpointError(f"{adapter / CONFIG_NAME}: has a megatron_config, and PEFT would import what that names")
    return config


def misfits(adapter: Path, layers: Mapping[str, tuple[int, int]], base: Iterable[str]) -> Iterator[str]:
    """Say which modules of a saved adapter do not fit a base that has the tensors `base` and linear layers of these
    shapes, [out, in], by name: from headers alone, as far as these tell. Raises CheckpointError for what is no saved
    adapter."""
    kind = kind_of(adapter, read_trained(adapter))
    stems = {name.rpartition(".")[0] for name in base}
    modules: dict[str, list[StoredTensor]] = {}
    for name, tensor in read_header(adapter / WEIGHTS_NAME).items():
        part = kind.part_of(name)
        module = part[0] if part else re.sub(r"(\.lora_\w+)?\.\w+$", "", name.removeprefix(PREFIX))
        modules.setdefault(re.sub(r"(\.base_layer)+$", "", module), []).append(tensor)
    for module, tensors in sorted(modules.items()):
        if (shape := layers.get(module)) is not None:
            if not _fits(kind, LinearModule(module, *shape, transposed=False), tensors):
                yield f"{module} is {shape[0]} x {shape[1]}, and has {', '.join(str(list(t.shape)) for t in tensors)}"
        elif not any(_lies_in(stem, module) for stem in stems):
            yield f"{module} is no module of the base"


def _lies_in(stem: str, module: str) -> bool:
    """Whether a base's tensor of this name lies in the module: with or without a prefix on either side, and for what is
    there once, such as an embedding, wherever the file has it."""
    names, stems = ({each, each.partition(".")[2] or each} for each in (module, stem))
    once = not re.search(r"\.\d", module)
    return any(f"{found}.".startswith(f"{name}.") for name in names for found in stems) or (
        once and module.rpartition(".")[2] in stem.split(".")
    )


def _fits(kind: Adapter, module: LinearModule, tensors: list[StoredTensor]) -> bool:
    """Whether what the kind of adapter stores for a module of some rank is among the tensors."""
    found = {tensor.name: tuple(tensor.shape) for tensor in tensors}
    ranks = {size for shape in found.values() for size in shape}
    return any(all(found.get(s.name) == tuple(s.shape) for s in kind.specs(module, rank)) for rank in ranks)
