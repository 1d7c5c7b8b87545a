"""The finished run that a polish starts from: whole, not trained, and with nothing in it that would be lost."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from qinit.adapters import ADAPTER_DIRECTORY, CONFIG_NAME, WEIGHTS_STEM
from qinit.errors import OutputError, ReportError
from qinit.files.manifest import MANIFEST_NAME, file_sum, manifest_text, read_manifest, some_of, strangers
from qinit.files.tensors import INDEX_NAME, StoredTensor, TensorSpec, read_header
from qinit.plan.plan import Plan
from qinit.report.adapter_card import require_base
from qinit.report.card import CARD_NAME, card_text
from qinit.report.pictures.files import PICTURES
from qinit.report.report import REPORT_NAME, Report
from qinit.source.checkpoint import Checkpoint

WEIGHTS = f"{ADAPTER_DIRECTORY}/{WEIGHTS_STEM}.safetensors"
ADAPTER = (WEIGHTS, f"{ADAPTER_DIRECTORY}/{CONFIG_NAME}")
ANEW = {*ADAPTER, "config.json", REPORT_NAME, CARD_NAME, MANIFEST_NAME, INDEX_NAME}  # written anew by every run


@dataclass(frozen=True)
class Before:
    """A finished run's directory, its report, and the sums of its files as its SHA256SUMS lists them."""

    directory: Path
    report: Report
    sums: dict[str, str]

    @classmethod
    def open(cls, directory: Path) -> Before:
        """Read the report of a run and make sure of all its files. Raises ReportError for what is no finished run, for
        damage, and for an adapter that was trained since."""
        report = Report.read(directory)
        require_base(report, directory, "a run is needed, with the base that it wrote")
        before = cls(directory, report, read_manifest(directory))
        for name in (*ADAPTER, "config.json", REPORT_NAME):
            if name not in before.sums:
                raise ReportError(f"{directory / MANIFEST_NAME}: does not list {name}; {_AGAIN}")
        before._require_whole()
        return before

    @property
    def identity(self) -> str:
        """What tells this run from any other: all its sums."""
        return manifest_text(self.sums)

    def _require_whole(self) -> None:
        for name in self._wrong():
            path = self.directory / name
            if name in ADAPTER and path.is_file():
                raise ReportError(
                    f"{path}: was changed since the run was made (its sum is not the one in {MANIFEST_NAME}), so the "
                    "adapter was trained or replaced; needed is the start that the run wrote: make it again"
                )
            if name != CARD_NAME:  # it is written anew
                what = "is not what the run wrote" if path.is_file() else "is missing"
                raise ReportError(f"{path}: {what} ({MANIFEST_NAME} lists it with another sum); {_AGAIN}")

    def _wrong(self) -> Iterator[str]:
        """Yield the names of the files that are not there or not as they are listed, the adapter's first."""
        for name in sorted(self.sums, key=lambda name: (name not in ADAPTER, name)):
            path = self.directory / name
            try:
                if not path.is_file() or file_sum(path) != self.sums[name]:
                    yield name
            except OSError as error:
                raise ReportError(f"{path}: cannot be read ({error.strerror})") from None

    def require_replaceable(self, plan: Plan) -> None:
        """Raise OutputError where something in the directory would be lost if a polished run took its place: files
        that the run did not write, and a card that was edited."""
        if others := strangers(self.directory, {*self.sums, *PICTURES}):
            raise OutputError(
                f"{self.directory}: holds what the run did not write and what would be lost when it is replaced: "
                f"{some_of(others)}; move it elsewhere, or leave the run as it is with --out"
            )
        card = self.directory / CARD_NAME
        if card.is_file() and card.read_bytes() != self._card(plan):
            raise OutputError(
                f"{card}: is not the card that qinit writes for this run, so it was edited (or another version wrote "
                "it), and it would be written anew; move it elsewhere, or leave the run as it is with --out"
            )

    def _card(self, plan: Plan) -> bytes:
        """Return the card that qinit writes; nothing where the report is not what qinit writes."""
        try:
            return card_text(self.report, plan.checkpoint.card_metadata()).encode()
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
            return b""

    def require_listed(self) -> None:
        """Raise OutputError where another run is in the directory by now, or another evaluation."""
        if read_manifest(self.directory) != self.sums:
            raise OutputError(f"{self.directory}: was changed since it was opened; start again")

    def require_unchanged(self) -> None:
        """Raise OutputError where any file of the run is no longer what it was."""
        self.require_listed()
        try:
            self._require_whole()
        except ReportError as error:
            raise OutputError(f"{error}; that was while it was polished, so it is left as it is now") from None

    @cached_property
    def base(self) -> dict[str, StoredTensor]:
        """The base's tensors."""
        return Checkpoint.open(self.directory, quantized=True).tensors

    def tensors(self, plan: Plan) -> dict[str, StoredTensor]:
        """Return base and adapter by the names that a plan's layers have for them.

        Raises ReportError where they are not what the plan lays out.
        """
        factors = read_header(self.directory / WEIGHTS)
        for specs, found in ((plan.base_specs, self.base), (plan.adapter_specs, factors)):
            self._compare({spec.name: spec for spec in specs}, found)
        return plan.split_base(self.base) | plan.split_adapter(factors)

    def _compare(self, specs: dict[str, TensorSpec], found: dict[str, StoredTensor]) -> None:
        for name in sorted(specs.keys() | found.keys()):
            expected, there = (_words(each.get(name)) for each in (specs, found))
            if expected != there:
                raise ReportError(
                    f"{self.directory}: tensor '{name}': expected {expected}, found {there}; `qinit verify "
                    f"{self.directory}` says what else is wrong"
                )

    def copy_others(self, to: Path) -> None:
        """Copy what a polish does not write anew: the tokenizer and the like, measured sensitivities."""
        weights = {tensor.file.name for tensor in self.base.values()}
        for name in sorted(self.sums.keys() - ANEW - weights - set(PICTURES)):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.directory / name, to / name)


_AGAIN = "make the run again with `qinit eqft`"


def _words(spec: TensorSpec | None) -> str:
    return "nothing" if spec is None else f"{spec.dtype} {list(spec.shape)}".removeprefix("torch.")
