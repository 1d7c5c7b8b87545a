"""What each layer's quantization costs the model's output, at every width and rank that it may get: the measurement,
what it was made for, and its file. `qinit.widths.fisher` makes it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qinit.errors import RecipeError
from qinit.files.reading import JSON_BYTES, parse_json, read_regular

if TYPE_CHECKING:
    pass

SENSITIVITY_NAME = "sensitivity.json"


class Option(NamedTuple):
    """What a layer may get."""

    bits: int
    group_size: int
    rank: int


Nats = dict[str, dict[Option, float]]


@dataclass(frozen=True)
class Sensitivity:
    """Predicted nats per token for each layer, by what it may get. `measured_for` holds the conditions of the
    measurement, `how` says on what it was made."""

    measured_for: dict[str, Any]
    how: str
    nats: Nats

    def to_json(self) -> dict[str, Any]:
        layers = {
            name: {_key(option, self.measured_for): value for option, value in options.items()}
            for name, options in self.nats.items()
        }
        return {"signature": self.measured_for, "how": self.how, "layers": layers}

    @classmethod
    def from_json(cls, values: Any) -> Sensitivity:
        """Undo `to_json`; raises RecipeError for what it has not made."""
        try:
            nats = {
                str(name): {_option(key, values["signature"]): _number(value) for key, value in options.items()}
                for name, options in values["layers"].items()
            }
            return cls(dict(values["signature"].items()), str(values["how"]), nats)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise RecipeError(f"{type(error).__name__}: {error}") from None

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> Sensitivity:
        """Read what `write` has written; raises RecipeError for a file that is damaged or something else."""
        try:
            return cls.from_json(parse_json(read_regular(file, JSON_BYTES)))
        except OSError as error:
            raise RecipeError(f"sensitivity: {file} cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError, RecipeError) as error:
            what = str(error) if isinstance(error, RecipeError) else f"{type(error).__name__}: {error}"
            raise RecipeError(
                f"sensitivity: {file} is no {SENSITIVITY_NAME} of qinit ({what}); leave the option out to measure anew"
            ) from None


def _key(option: Option, measured_for: dict[str, Any]) -> str:
    """2x16 for bits and rank in groups of the size that was measured for, 2x32x16 in others."""
    group = "" if option.group_size == measured_for.get("group_size") else f"{option.group_size}x"
    return f"{option.bits}x{group}{option.rank}"


def _option(key: str, measured_for: dict[str, Any]) -> Option:
    bits, *group, rank = map(int, key.split("x"))
    (group_size,) = group or (int(measured_for["group_size"]),)
    return Option(bits, group_size, rank)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"{value!r} is no number of nats")
    return float(value)


@dataclass(frozen=True)
class Allocation:
    """How widths were given to layers. `front`, `chosen` and `uniform` are points of bits per weight and predicted loss
    (nats per token over full precision), the last one for each single width; empty where no loss was measured. The
    adapter counts in these where one budget is for both; then `prices` are the nats that a megabyte more would win, by
    what it is spent on."""

    how: str
    metric: str
    front: tuple[tuple[float, float], ...] = ()
    chosen: tuple[float, float] | None = None
    uniform: tuple[tuple[float, float], ...] = ()
    sensitivity: Sensitivity | None = None
    prices: dict[str, float] = field(default_factory=dict)
