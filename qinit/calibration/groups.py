"""Which layers of a block read the same input, in the order in which they run, and what they write to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from qinit.calibration.experts import portions
from qinit.plan.parts import LayerPlan


@dataclass
class Group:
    """Layers of one block that read the same input, the first of them named `inner` within the block. `writes` says
    what a layer's output is added to: the block's input (`input`), its output (`output`), what another group reads (its
    `inner`), or unknown (None).

    Or experts of one parameter, `stack` within the block, that are measured together, each on its own tokens."""

    inner: str
    layers: list[LayerPlan] = field(default_factory=list)
    writes: dict[str, str | None] = field(default_factory=dict)
    stack: str | None = None

    @property
    def at_end(self) -> bool:
        """Whether the block's output tells what is missing where these layers write to."""
        return bool(self.writes) and all(kind == "output" for kind in self.writes.values())

    @property
    def added_to(self) -> str | None:
        """The one place before them that their outputs are added to: `input`, or the name of another group."""
        places = {kind for kind in self.writes.values() if kind not in (None, "output")}
        return places.pop() if len(places) == 1 else None

    @property
    def reader(self) -> str | None:
        """The group whose input their outputs are added to, if it is one's."""
        return None if self.added_to == "input" else self.added_to


class Groups:
    """The groups of a block whose layers are given by their names within it, found while the block runs.

    `written` says what a layer writes to; it is asked once for each.
    """

    def __init__(self, layers: Mapping[str, LayerPlan], written: Callable[[str], str | None]) -> None:
        self.layers, self.written = layers, written
        self.found: list[Group] = []
        self.group_of: dict[str, Group] = {}

    def add(self, inputs: Mapping[str, object]) -> None:
        """Take what the layers that one batch has reached have read, tensors, in the order in which they ran."""
        for inner, x in inputs.items():
            if inner in self.group_of:
                continue
            if self.layers[inner].target.module.expert is not None:
                self._add_experts(inner.rpartition("[")[0])
                continue
            shared = (self.group_of[other] for other, y in inputs.items() if y is x and other in self.group_of)
            group = next(shared, None)
            if group is None:
                group = Group(inner)
                self.found.append(group)
            group.layers.append(self.layers[inner])
            group.writes[self.layers[inner].target.name] = self.written(inner)
            self.group_of[inner] = group

    @property
    def names(self) -> list[list[str]]:
        """The names of each group's layers, of experts that of the first."""
        inner_of = {id(layer): inner for inner, layer in self.layers.items()}
        return [
            [group.inner] if group.stack is not None else [inner_of[id(layer)] for layer in group.layers]
            for group in self.found
        ]

    def joined(self, others: Sequence[list[list[str]]]) -> Groups:
        """Return the groups of all parts of the text, given the `names` that each has found, in their order: the same
        as if one part after the other had been added."""
        if all(names == self.names for names in others):
            return self
        whole = Groups(self.layers, self.written)
        for names in others:
            whole.add(dict(_marked(names)))
        return whole

    def _add_experts(self, stack: str) -> None:
        """Take all experts of a parameter, in portions, those too that nothing has reached yet."""
        names = {id(layer): name for name, layer in self.layers.items() if name.rpartition("[")[0] == stack}
        for some in portions([layer for layer in self.layers.values() if id(layer) in names]):
            group = Group(names[id(some[0])], some, stack=stack)
            self.found.append(group)
            self.group_of |= {names[id(layer)]: group for layer in some}

    @property
    def unreached(self) -> list[LayerPlan]:
        return [layer for inner, layer in self.layers.items() if inner not in self.group_of]


def _marked(names: list[list[str]]) -> Iterator[tuple[str, object]]:
    """Yield each name with a mark that the names of its group share, as they share an input."""
    for group in names:
        mark = object()
        for inner in group:
            yield inner, mark
