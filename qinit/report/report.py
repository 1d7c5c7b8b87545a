"""The report of a run: what was asked, what was written and how close it is. Kept as qinit.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from qinit.errors import ReportError
from qinit.files.reading import parse_json, read_regular
from qinit.recipe_files import KEY, NOT_LINEAR, SPIKING
from qinit.solver.methods import STARTS

REPORT_NAME = "qinit.json"
TRAINING = "snndlft"  # the kind of the report of a training
REPORT_BYTES = 64 << 20  # a model of 70,000 experts has half of that
# What a report may hold: whoever draws it has no other check.
Count = Annotated[int, Field(ge=0, lt=2**60)]
Size = Annotated[int, Field(ge=1, lt=2**60)]
Measure = Annotated[float, Field(ge=0, le=1e30)]


@dataclass(frozen=True)
class LayerRow:
    """One layer's result. Errors are Frobenius norms relative to the weight's: `error_start` of Q alone
    (what a trainer without the adapter would get), `error` of Q + s B A; None for a layer kept as it is. With
    calibration, the output errors are the same relative to the layer's output, and `tokens` were seen."""

    name: str
    shape: tuple[Size, Size]
    bits: Annotated[int, Field(ge=1, le=64)] | None
    group_size: Count | None
    rank: Count
    bytes_before: Count
    bytes_after: Count
    error_start: Measure | None
    error: Measure | None
    trace: tuple[float, ...]
    seconds: float
    kept: str | None = None
    output_error_start: Measure | None = None
    output_error: Measure | None = None
    tokens: Count | None = None


@dataclass(frozen=True)
class Exported:
    """What was made of a run: the form and its reader, whether the adapter is a trained one and not the run's own, and
    what of the run that form does not hold."""

    to: str
    reader: str
    trained: bool
    lost: str | None


@dataclass(frozen=True)
class Report:
    """A run's report; `to_json` is what qinit.json holds. Beside an export it is the run's, and `export` is there."""

    model: str
    command: str
    recipe: dict[str, Any]
    source: dict[str, Any]
    versions: dict[str, str]
    totals: dict[str, Any]
    notes: tuple[str, ...]
    layers: tuple[LayerRow, ...]
    export: Exported | None = None

    @property
    def method(self) -> str:
        """The method's name, as the command is called."""
        mixed = any(self.recipe.get(key) is not None for key in ("ratio", "target_bits", "target_size"))
        return "meqft" if mixed else str(self.recipe.get("method", ""))

    @property
    def start(self) -> bool:
        """Whether it is a published start of a full-precision model."""
        return self.recipe.get("method") in STARTS

    @property
    def done(self) -> str:
        """What was done with the layers' weights, in a word."""
        if self.recipe.get("base") is not None and not self.start:
            return "repaired"
        return "adapted" if self.start and self.recipe.get("bits") == 16 else "quantized"

    @property
    def loader(self) -> str:
        """The name of the transformers class that loads the base: the model's own, or for code that the checkpoint
        brings the auto class that it is registered for."""
        return str(self.source.get("loader") or self.source["class"])

    def to_dict(self) -> dict[str, Any]:
        """Return what qinit.json holds; a run's has no key `export`."""
        return {key: value for key, value in asdict(self).items() if key != "export" or value is not None}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def write(self, directory: Path) -> None:
        (directory / REPORT_NAME).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Report:
        """Read the report in a run's directory; keys of a later qinit are passed over. Raises ReportError."""
        from pydantic import TypeAdapter

        path, remedy = directory / REPORT_NAME, "pass the directory that `qinit eqft` wrote"
        try:
            report = TypeAdapter(cls).validate_json(read_regular(path, REPORT_BYTES), strict=True)
        except FileNotFoundError:
            what = "no such file" if directory.is_dir() else "no such directory"
            if (directory / "adapter_config.json").is_file():
                remedy = (
                    "an adapter lies here: give the run that it was trained on, and this directory with --adapter; one "
                    "of no run is uploaded by `hf upload REPO DIR`"
                )
            raise ReportError(f"{path if directory.is_dir() else directory}: {what}; {remedy}") from None
        except OSError as error:
            raise ReportError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
        except ValidationError as error:
            if (other := _another_kind(directory)) is not None:
                raise ReportError(f"{directory}: {other}; {remedy}") from None
            first = error.errors()[0]
            if first["type"] == "json_invalid":
                raise ReportError(f"{path}: not JSON ({first['ctx']['error']}); run `qinit eqft` again") from None
            raise ReportError(f"{path}: not a report of qinit ({first_wrong(error)}); {remedy}") from None
        if not report.layers:
            raise ReportError(f"{path}: not a report of qinit (it has no layers); {remedy}")
        for key in ("bits_per_weight", "grid_bits_per_weight"):
            value = report.totals.get(key, 0)
            if type(value) not in (int, float) or not 0 <= value <= 64:
                raise ReportError(f"{path}: not a report of qinit (totals.{key} is {value!r}); {remedy}")
        return report


def first_wrong(error: ValidationError) -> str:
    """Say where a report is first not what it should be, and how."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the whole'}: {first['msg']}"


def _another_kind(directory: Path) -> str | None:
    """Say what a directory is whose report is not a run's, None for a run."""
    match kind_of_report(directory):
        case "merge":
            return "is a merge, not a run (it has no adapter)"
        case kind if kind == TRAINING:
            spiking = _said(directory / "adapter_config.json", KEY) == SPIKING
            why = NOT_LINEAR if spiking else "an AdaLoRA adapter, which stock PEFT loads and merges"
            return f"is what `qinit snndlft` trained, not a run: {why}"
    return None


def kind_of_report(directory: Path) -> str:
    """Return what the report in a directory is of, by its own word: a run says nothing."""
    return _said(directory / REPORT_NAME, "kind")


def _said(file: Path, key: str) -> str:
    """Return what a file of JSON has under a key; an empty string where that is nothing."""
    try:
        value = parse_json(read_regular(file, REPORT_BYTES))
    except (OSError, ValueError):
        return ""
    return str(value.get(key, "")) if isinstance(value, dict) else ""


def is_training(directory: Path) -> bool:
    """Whether a directory says of itself that `qinit snndlft` wrote it."""
    return kind_of_report(directory) == TRAINING
