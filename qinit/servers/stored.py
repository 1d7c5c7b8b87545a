"""How a base is stored, as config.json says it: by qinit, by an export or by another program."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qinit.servers.base import DENSE, GGUF, MLX
from qinit.source.checkpoint import read_json

Grid = tuple[int | None, int | None, bool]  # bits, group size, whether it has zero points


@dataclass(frozen=True)
class StoredBase:
    """`grids` are those that layers have, `by_pattern` the widths that some of them have, by expressions for their
    names."""

    form: str
    grids: frozenset[Grid] = frozenset()
    by_pattern: Mapping[str, Grid] | None = None

    @property
    def mixed(self) -> bool:
        return len(self.grids) > 1

    def grid_of(self, module: str) -> Grid | None:
        """Return what a module has where a pattern says it, None for all others."""
        for pattern, grid in (self.by_pattern or {}).items():
            if re.match(pattern, module):
                return grid
        return None

    @classmethod
    def of(cls, directory: Path) -> StoredBase:
        """Read it. Raises CheckpointError for a directory that has neither a GGUF file nor a config.json."""
        if any(directory.glob("*.gguf")):
            return cls(GGUF)
        config = read_json(directory / "config.json", "a model's directory has one")
        found = config.get("quantization_config")
        own = config.get("quantization")
        if isinstance(own, dict) and not (isinstance(found, dict) and "quant_method" in found):
            return cls(MLX, frozenset(_of_mlx(own)))
        if not isinstance(found, dict):
            return cls(DENSE)
        method = str(found.get("quant_method"))
        patterns = dict(_patterns(found, method))
        first = [] if method == "compressed-tensors" else [_grid(found)]
        return cls(method, frozenset([*first, *patterns.values()]), patterns)


def _grid(config: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> Grid:
    values = {**(base or {}), **config}
    bits = values.get("bits", values.get("num_bits"))
    symmetric = values.get("sym", values.get("symmetric", False))
    bits = (4 if values.get("load_in_4bit") else 8 if values.get("load_in_8bit") else None) if bits is None else bits
    return bits, values.get("group_size"), not symmetric


def _patterns(config: dict[str, Any], method: str) -> Iterator[tuple[str, Grid]]:
    """Yield expressions and the grids of the layers that they match: GPTQ's `dynamic`, the groups of
    compressed-tensors, the layers of auto-round."""
    if method == "compressed-tensors":
        for group in (config.get("config_groups") or {}).values():
            for target in group.get("targets") or ():
                pattern = target[3:] if target.startswith("re:") else rf".*{re.escape(target)}$"
                yield pattern, _grid(group.get("weights") or {})
        return
    for pattern, changes in (config.get("dynamic") or {}).items():
        if not pattern.startswith("-:"):
            yield pattern.removeprefix("+:"), _grid(changes, config)
    for name, changes in (config.get("extra_config") or {}).items():
        if isinstance(changes, dict) and (changes.get("bits") or 0) < 16:
            yield rf"{re.escape(name)}$", _grid(changes, config)


def _of_mlx(config: dict[str, Any]) -> Iterator[Grid]:
    yield config.get("bits"), config.get("group_size"), True
    for value in config.values():
        if isinstance(value, dict):
            yield value.get("bits", config.get("bits")), value.get("group_size", config.get("group_size")), True
