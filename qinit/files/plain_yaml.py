"""YAML of plain values: in a file of its own, as every command imports `reading.py`, and not PyYAML."""

from __future__ import annotations

from typing import Any

import yaml


class PlainLoader(yaml.SafeLoader):
    """Refuses anchors, aliases and names that stand there twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            line = event.start_mark.line + 1
            raise yaml.YAMLError(f"line {line}: '{event.anchor}' is an anchor or alias; write the value itself")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        made = super().construct_mapping(node, deep)
        if len(made) != len(node.value):
            names = [str(key.value) for key, _ in node.value]
            twice = next((f"'{name}'" for name in names if names.count(name) > 1), "a name")
            raise yaml.YAMLError(f"line {node.start_mark.line + 1} and on: {twice} stands there twice")
        return made
