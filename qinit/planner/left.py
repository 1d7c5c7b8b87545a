"""What a plan leaves alone that somebody may have expected in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from qinit.source.names import Names
from qinit.source.targets import Architecture, Target


def left_alone(
    architecture: Architecture, names: Names, targets: Sequence[Target], chosen: Sequence[Target]
) -> Iterator[str]:
    """Say which layers are left alone, and why: those beside the language model, and those whose weight is not in the
    checkpoint as it stands. `targets` are all that could be chosen."""
    known = {target.name for target in targets}
    for module in architecture.linear:
        made_of = ", ".join(names.made_of(f"{module.name}.weight"))
        if module.name not in known and made_of:
            yield f"{module.name} stays as it is: transformers makes its weight of {made_of} while it loads the model"
    if any(not architecture.in_language(target.name) for target in chosen):
        return
    beside = Counter(
        _part(architecture, target.name) for target in targets if not architecture.in_language(target.name)
    )
    if beside:
        parts = ", ".join(f"{count} in {part}" for part, count in beside.items())
        yield (
            f"linear layers beside the language model stay as they are: {parts}; --target-modules with names, or '.*' "
            "for all, chooses them too"
        )


def _part(architecture: Architecture, module: str) -> str:
    """Return the name of the part of the model, beside the language model, that a module lies in."""
    parts = module.split(".")
    shared = 0
    for part, other in zip(parts, architecture.language.split("."), strict=False):
        if part != other:
            break
        shared += 1
    return ".".join(parts[: shared + 1])
