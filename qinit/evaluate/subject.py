"""What is evaluated: a run's base with its adapter, another base with or without one, or a plain checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qinit.adapters import ADAPTER_DIRECTORY, CONFIG_NAME, WEIGHTS_STEM
from qinit.errors import CheckpointError, HubError
from qinit.files.atomic import replace_text
from qinit.files.manifest import refresh
from qinit.hub.download import local_directory
from qinit.report.merged import is_merge
from qinit.report.report import REPORT_NAME
from qinit.source.checkpoint import read_json
from qinit.source.demo import DEMO_NAME, demo_directory
from qinit.source.vocabulary import CAUSAL_ENDINGS, Facts

BASE_KEY = "base_model_name_or_path"


@dataclass(frozen=True)
class Subject:
    """A base and, unless None, an adapter on it. `name` is for reports. `lost` is the base that the adapter's file
    names, where it is not there and the run that the adapter lies in was taken instead. `trust_remote_code` runs code
    that lies in the base's directory. `loader`, of a dtype and a device, loads what stock PEFT does not."""

    name: str
    base: Path
    adapter: Path | None = None
    lost: str | None = None
    trust_remote_code: bool = False
    loader: Callable[[Any, Any], Any] | None = None

    @property
    def run(self) -> Path | None:
        """The run's directory whose own base and adapter these are, or None."""
        own = self.adapter is not None and self.adapter.resolve() == (self.base / ADAPTER_DIRECTORY).resolve()
        return self.base if own and (self.base / REPORT_NAME).is_file() else None

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.base / "config.json", "a model directory has one; is this the right directory?")

    @cached_property
    def facts(self) -> Facts:
        """What the configuration says about tokens. Raises CheckpointError for a model that predicts no next token."""
        facts = Facts.read(self.base, self.config, self.trust_remote_code)
        if not facts.causal:
            raise CheckpointError(
                f"{facts.config_file}: perplexity needs a causal language model (an architecture that ends in "
                f"{' or '.join(CAUSAL_ENDINGS)}), found {facts.architecture}"
            )
        return facts


def find_subject(
    directory: str | None, base: str | None, adapter: Path | None, revision: str | None = None, token: str | None = None
) -> Subject:
    """Return what to evaluate: `directory` is a run's, an adapter's or a checkpoint's directory, or a Hub id; or `base`
    (the same, without the adapter of a run) and `adapter`, of which `adapter` may stand alone.

    Raises CheckpointError for what is missing, with what to give instead, and HubError for what the Hub answers.
    """
    if (directory is None) == (base is None and adapter is None):
        raise CheckpointError("give a directory or --base and --adapter, one of the two")
    if directory is not None and _is_adapter(Path(directory)):
        adapter = Path(directory)
    elif directory is not None:
        found = find_model(directory, revision, token)
        if not (found / REPORT_NAME).is_file() or is_merge(found):
            return Subject(directory, found)
        own = found / ADAPTER_DIRECTORY
        if not own.is_dir():
            raise CheckpointError(
                f"{own}: not found, so the run has no adapter to evaluate; `--base {directory}` evaluates its base "
                "alone, and --adapter takes another adapter"
            )
        _require_adapter(own)
        return Subject(directory, found, own, _gone(own))
    if adapter is not None:
        _require_adapter(adapter)
    if base is not None:
        name = base if adapter is None else f"{base} with {adapter}"
        return Subject(name, find_model(base, revision, token), adapter)
    assert adapter is not None
    return _base_of(adapter, revision, token)


def find_model(name: str, revision: str | None = None, token: str | None = None) -> Path:
    """Return the directory of a model: a local one, the embedded demo model by its name, or a Hub id's."""
    if name == DEMO_NAME and not Path(name).exists():
        return demo_directory()
    return local_directory(name, revision, token)


def repair_base(subject: Subject) -> None:
    """Write the base's place into the adapter's file, where it names one that is lost. Raises OutputError."""
    if subject.adapter is None or subject.lost is None:
        return
    file = subject.adapter / CONFIG_NAME
    config = {**read_json(file, ""), BASE_KEY: str(subject.base.resolve())}
    replace_text(file, json.dumps(config, indent=2) + "\n")
    if subject.run is not None:
        refresh(subject.run, [f"{ADAPTER_DIRECTORY}/{CONFIG_NAME}"])


def _base_of(adapter: Path, revision: str | None, token: str | None) -> Subject:
    """Find the run that an adapter was written with, else the base that it names, else the run that it lies in."""
    named, parent = _named_base(adapter), adapter.resolve().parent
    own = _is_run(parent) and adapter.resolve().name == ADAPTER_DIRECTORY  # even if an older copy is where it says
    if not own and named is not None and Path(named).is_dir():
        return Subject(str(adapter), Path(named), adapter)
    if _is_run(parent):
        gone = None if named is not None and Path(named).is_dir() else named
        return Subject(str(adapter), parent, adapter, gone)
    missing = f"{adapter / CONFIG_NAME}: names the base '{named}', which is not there"
    if named is None:
        missing = f"{adapter / CONFIG_NAME}: names no base under {BASE_KEY}"
    elif not Path(named).is_absolute():
        try:
            return Subject(str(adapter), find_model(named, revision, token), adapter)
        except (CheckpointError, HubError) as error:
            missing += f" ({error})"
    raise CheckpointError(f"{missing}; if it has moved, say where it is now with --base")


def _gone(adapter: Path) -> str | None:
    """Return the base that the adapter of a run names, if that is a directory that is not there."""
    named = _named_base(adapter)
    return named if named is not None and Path(named).is_absolute() and not Path(named).is_dir() else None


def _named_base(adapter: Path) -> str | None:
    named = read_json(adapter / CONFIG_NAME, "").get(BASE_KEY)
    return named if isinstance(named, str) and named else None


def _is_adapter(directory: Path) -> bool:
    return (directory / CONFIG_NAME).is_file() and not (directory / "config.json").exists()


def _is_run(directory: Path) -> bool:
    return (directory / "config.json").is_file() and (directory / REPORT_NAME).is_file()


def _require_adapter(adapter: Path) -> None:
    for name in (CONFIG_NAME, f"{WEIGHTS_STEM}.safetensors"):
        if not (adapter / name).is_file():
            raise CheckpointError(f"{adapter / name}: not found; an adapter's directory has one")
