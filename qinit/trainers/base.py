"""What is known of a trainer, and what is written for it."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qinit.adapters import ADAPTER_DIRECTORY
from qinit.adapters.reading import SavedAdapter
from qinit.errors import CheckpointError
from qinit.files.reading import printable
from qinit.formats import FORMATS, READERS
from qinit.report.adapter_card import is_adapter
from qinit.report.card import packed_mixed, snippet_of
from qinit.report.report import REPORT_NAME, Report
from qinit.source.vocabulary import CAUSAL_ENDINGS
from qinit.trainers.training import Training


def quoted(text: str) -> str:
    """Return a string as Python and JSON read it."""
    return json.dumps(text, ensure_ascii=False)


@dataclass(frozen=True)
class TrainableRun:
    """A finished run as a trainer sees it, or an adapter alone: where it lies, what its report says, and its
    adapter_config.json."""

    directory: Path
    report: Report
    adapter: dict[str, Any]

    @classmethod
    def open(cls, directory: Path) -> TrainableRun:
        """Read a run's report and its adapter's header. Raises ReportError and CheckpointError."""
        report = Report.read(directory)
        if report.recipe.get("format") not in FORMATS or not isinstance(report.source.get("class"), str):
            raise CheckpointError(
                f"{directory / REPORT_NAME}: names no format that this qinit knows, or no model class; "
                "pass the directory that `qinit eqft` wrote"
            )
        place = directory if is_adapter(report) else directory / ADAPTER_DIRECTORY
        return cls(directory.resolve(), report, SavedAdapter.open(place).settings)

    @property
    def start(self) -> str:
        """Where the adapter lies."""
        return str(self.directory if is_adapter(self.report) else self.directory / ADAPTER_DIRECTORY)

    @property
    def base(self) -> str:
        """Where the base lies, or its id on the Hub."""
        return str(self.report.totals["base"]["name"] if is_adapter(self.report) else self.directory)

    @property
    def form(self) -> str:
        """The name of the form that the base is stored in."""
        return str(self.report.totals["base"]["form"] if is_adapter(self.report) else self.report.recipe["format"])

    @property
    def class_name(self) -> str:
        return str(self.report.source["class"])

    @property
    def causal(self) -> bool:
        return self.class_name.endswith(CAUSAL_ENDINGS)

    @property
    def packed(self) -> bool:
        """Whether the base holds codes in the place of weights."""
        return any(each.parts for each in (*FORMATS.values(), *READERS) if each.name == self.form)

    @property
    def packed_mixed(self) -> bool:
        return packed_mixed(self.report)

    @property
    def bits(self) -> int:
        """The width of the base's layers, as a comparison names it: 16 of a base that is not quantized."""
        if is_adapter(self.report) and self.packed:
            return next((row.bits for row in self.report.layers if row.bits), 0)
        return int(self.report.recipe.get("bits") or 0)

    @property
    def own_code(self) -> bool:
        return bool(self.report.recipe.get("trust_remote_code"))

    def loading(self, imports: Sequence[str]) -> dict[str, str]:
        """Return the parts of a script that loads base and adapter as `model`: these `imports` and those that the lines
        of the run's model card need, the lines, and how the base is named to `from_pretrained`."""
        first, *lines = snippet_of(self.report, str(self.directory))
        return {
            "imports": "\n".join([*imports, *first.split("; ")]),
            "loading": "\n".join(lines),
            "base": quoted(self.base),
            "trusted": ", trust_remote_code=True" if self.own_code else "",
        }


class Trainer(ABC):
    """A program that trains the adapter of a run further. Stateless."""

    name: str
    title: str  # its name among people
    suffix: str  # of what is written for it
    command: str  # that takes it: `python {file}`
    seen: str  # the versions that it was run with, or the source that was read
    distribution = ""  # its package, whose pins `qinit doctor` compares with what is installed
    install: tuple[str, ...] = ()  # pip commands that work, in this order; torch is installed before them
    packed_install: tuple[str, ...] = ()  # what packed bases need after them
    breaks: tuple[tuple[str, str], ...] = ()  # other packages that break it: their versions, and what happens

    def cannot_take(self, run: TrainableRun) -> str | None:
        """Return why this trainer cannot take a run, and what can be done, or None. The default is that of trainers of
        causal language models that load with stock transformers."""
        if not run.causal:
            return (
                f"trains causal language models, and the run's model is {run.class_name}; --trainer transformers takes "
                "masked ones too, and others need a script of their own around the lines in the run's README.md"
            )
        if run.form not in FORMATS:
            return (
                f"was not tried with a base in the form {run.form}; --trainer trl and transformers load what "
                "transformers and PEFT do"
            )
        if run.packed_mixed:
            return (
                "loads packed weights of one width only, and the run has several; use --trainer trl or transformers, "
                "whose scripts load with qinit.load, or run qinit again with --format dense"
            )
        return None

    @abstractmethod
    def config(self, run: TrainableRun, training: Training) -> str:
        """Return the script or the configuration that trains a run's adapter."""

    def head(self, run: TrainableRun) -> dict[str, str]:
        """Return what stands above every one: what it does, and where it comes from."""
        return {
            "head": f"Fine-tunes {printable(str(run.directory))} with {self.title}.",
            "origin": f"Written by `qinit trainer-config`; {self.seen}.",
        }

    def parts(self, run: TrainableRun, training: Training) -> dict[str, str]:
        """Return what every script has: the head, and in Python its data, its rate and its output."""
        return {
            **self.head(run),
            "rows": training.rows,
            "rate": training.python_rate,
            "output": quoted(self.output(run)),
        }

    def output(self, run: TrainableRun) -> str:
        """Return the directory, below the current one, that the trained adapter goes to."""
        return f"{run.directory.name}-{self.name}"


class Untrainable(Trainer):
    """A trainer that takes no run at all, for a `reason` that also says what would work."""

    suffix = command = ""
    reason: str

    def cannot_take(self, run: TrainableRun) -> str | None:
        return f"{self.reason} ({self.seen})"

    def config(self, run: TrainableRun, training: Training) -> str:
        raise NotImplementedError(f"{self.name} takes no run")  # pragma: no cover - cannot_take said so
