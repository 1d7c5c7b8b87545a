"""What of a finished run goes onto the Hub, and what of it is made anew for there. The run itself is only read.

What is pushed differs from the directory in three files, which are made anew: the adapter's configuration and the card
name the repo id, and SHA256SUMS is the list of what is pushed. An adapter that was trained takes the place of the run's
own, in another folder; of what its trainer has saved beside it, nothing is pushed. Of an adapter alone qinit.json is
made anew too, as its base may be named by a place on this machine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path, PurePosixPath

from qinit.adapters import ADAPTER_DIRECTORY, CONFIG_NAME
from qinit.adapters.trained import WEIGHTS_NAME, misfits
from qinit.errors import CheckpointError, HubError, ReportError
from qinit.files.manifest import MANIFEST_NAME, bytes_sum, file_sum, listed, manifest_text, read_manifest
from qinit.files.tensors import read_header
from qinit.report.adapter_card import adapter_snippet, is_adapter
from qinit.report.card import TRAINED_DIRECTORY, hub_card, snippet_of
from qinit.report.exported import download_lines, hub_export_card
from qinit.report.merged import MergeReport, is_merge, merged_snippet, on_hub
from qinit.report.pictures.files import PICTURES
from qinit.report.published import Published, hub_id_of, public_card, public_report
from qinit.report.report import REPORT_NAME, Report, is_training
from qinit.source.checkpoint import read_json, weight_files

CARD_NAME = "README.md"
ADAPTER_CONFIG = f"{ADAPTER_DIRECTORY}/{CONFIG_NAME}"
BASE_KEY = "base_model_name_or_path"
# What a trainer leaves in a directory, some of it pickles: no part of a run, with SHA256SUMS or without.
STATE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True)
class Change:
    """A value that is another one in what is pushed."""

    file: str
    field: str
    before: str
    after: str


@dataclass(frozen=True)
class Prepared:
    """What would be pushed: `files` are names and sizes in bytes, `rewritten` the contents of those that differ from
    the directory's, `left_out` the names of what lies there and the run did not write."""

    directory: Path
    repo_id: str
    report: Report | MergeReport
    files: dict[str, int]
    rewritten: dict[str, bytes]
    changes: tuple[Change, ...]
    left_out: tuple[str, ...]
    trained: Path | None = None  # the directory of the adapter that takes the place of the run's own
    base: str | None = None  # of an adapter alone: the id on the Hub of what it is for
    notes: tuple[str, ...] = ()  # what whoever pushes should know

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())

    def snippet(self, revision: str | None = None) -> list[str]:
        """Return the lines that load base and adapter, or the merged model, from the Hub: Python's, or of an export
        what brings it here."""
        if isinstance(self.report, MergeReport):
            return merged_snippet(self.report, self.repo_id, revision)
        if self.report.export is not None:
            return [*download_lines(self.repo_id, revision), f"# then as {CARD_NAME} says"]
        if is_adapter(self.report):
            trained = self.trained is not None
            return adapter_snippet(self.report, self.repo_id, revision=revision, trained=trained)
        return snippet_of(self.report, self.repo_id, on_hub=True, revision=revision, trained=self.trained is not None)

    def source(self, name: str) -> Path:
        """Return the file that is pushed under this name, unless it is made anew."""
        alone = isinstance(self.report, Report) and is_adapter(self.report)
        path, place = PurePosixPath(name), "." if alone else TRAINED_DIRECTORY
        if self.trained is not None and str(path.parent) == place and path.name in (CONFIG_NAME, WEIGHTS_NAME):
            return self.trained / path.name
        return self.directory / name


def require_name(repo_id: str) -> None:
    """Raise HubError for what is no OWNER/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"{repo_id}: no name for a repository on the Hub ({error})") from None
    if "/" not in repo_id:
        raise HubError(f"{repo_id}: names no owner; give OWNER/NAME, as the Hub has it in addresses")


def prepare(directory: Path, repo_id: str, adapter: Path | None = None, base: str | None = None) -> Prepared:
    """Read a run's directory or an export's, check every file against its SHA256SUMS, and make what differs on the Hub.

    Only the card may have been changed by hand. `adapter`, the directory of an adapter that was trained on the run,
    takes the place of the run's own. `base` is the id on the Hub of what an adapter alone is for, where its own files
    do not say one. Raises HubError for what is no OWNER/NAME, ReportError or CheckpointError for a directory that is no
    finished run, or one with a file that is missing or not what the run wrote, and for an adapter that does not fit.
    A merge, which has no adapter, is pushed as it is.
    """
    require_name(repo_id)
    if is_merge(directory):
        _refuse_base(directory, base)
        return _prepare_merge(directory, repo_id, adapter)
    if is_training(directory):
        raise ReportError(_trained_alone(directory, repo_id))
    report = Report.read(directory)
    if is_adapter(report) and report.export is None:
        return _prepare_alone(directory, repo_id, report, adapter, base)
    _refuse_base(directory, base)
    exported = report.export is not None
    if exported and adapter is not None:
        raise ReportError(f"{directory}: is an export; make one of its run with `qinit export RUN --adapter {adapter}`")
    if not exported:  # an export's may be in other files
        weight_files(directory)
    there = listed(directory)
    names = [name for name in there if not _is_state(name)]
    sums: dict[str, str] = {}
    if (directory / MANIFEST_NAME).is_file():
        sums = read_manifest(directory)
        names = sorted({*sums, *(name for name in PICTURES if name in there)})
    own = f"{ADAPTER_DIRECTORY}/"
    if adapter is not None:
        names = [name for name in names if not name.startswith(own)]
        _require_fit(adapter, directory, report)
    needed = ["config.json"] if adapter is not None else ["config.json", ADAPTER_CONFIG, own + WEIGHTS_NAME]
    needed = [CARD_NAME] if exported else needed
    for name in (*names, *needed):
        if name not in there:
            raise ReportError(f"{directory / name}: missing, so this is no finished run; run `qinit eqft` again")
    found = _sums(directory, names, sums)
    place = TRAINED_DIRECTORY if adapter is not None else ADAPTER_DIRECTORY
    prepared = Prepared(directory, repo_id, report, {}, {}, (), (), adapter)
    configuration, weights = f"{place}/{CONFIG_NAME}", f"{place}/{WEIGHTS_NAME}"
    rewritten, changes = {}, []
    if not exported or ADAPTER_CONFIG in names:  # another reader's adapter names no base
        config = read_json(prepared.source(configuration), "so this is no finished run; run `qinit eqft` again")
        changes = [Change(configuration, BASE_KEY, str(config.get(BASE_KEY)), repo_id)]
        rewritten = {configuration: f"{json.dumps({**config, BASE_KEY: repo_id}, indent=2)}\n".encode()}
        found[weights] = _sum(prepared.source(weights))
    if CARD_NAME in names:
        card = (directory / CARD_NAME).read_bytes().decode("utf-8", "replace")
        theirs = (
            hub_export_card(card, repo_id) if exported else hub_card(card, report, repo_id, trained=adapter is not None)
        )
        theirs = public_card(theirs, report)
        rewritten[CARD_NAME] = theirs.encode()
        changes += _changed_lines(CARD_NAME, card, theirs)
    public = public_report(report)
    if public.to_json() != report.to_json():
        rewritten[REPORT_NAME] = public.to_json().encode()
        changes += _changed_lines(REPORT_NAME, report.to_json(), public.to_json())
    return _completed(replace(prepared, report=public), found, rewritten, changes, there)


def _prepare_alone(directory: Path, repo_id: str, report: Report, adapter: Path | None, base: str | None) -> Prepared:
    """Prepare an adapter that was made for a base which exists. What its files say of places on this machine, the
    base's too, is not pushed."""
    if base is not None:
        require_name(base)
    named = base or hub_id_of(report.totals["base"]["name"])
    public = Published.of(report, named)
    there, sums = listed(directory), read_manifest(directory)  # pictures name the base's place, and stay here
    names = sorted(sums)
    if adapter is not None:
        names = [name for name in names if name not in (CONFIG_NAME, WEIGHTS_NAME)]
        _require_fit(adapter, directory, report)
    for name in (*names, REPORT_NAME, CARD_NAME, *(() if adapter else (CONFIG_NAME, WEIGHTS_NAME))):
        if name not in there:
            raise ReportError(f"{directory / name}: missing, so this is no whole adapter; run `qinit adapter` again")
    found = _sums(directory, names, sums)
    prepared = Prepared(directory, repo_id, public.report, {}, {}, (), (), adapter, named)
    found[WEIGHTS_NAME] = _sum(prepared.source(WEIGHTS_NAME))
    config = read_json(prepared.source(CONFIG_NAME), "an adapter has one")
    card = (directory / CARD_NAME).read_bytes().decode("utf-8", "replace")
    theirs = public.card(card, repo_id, trained=adapter is not None)
    rewritten = {
        CONFIG_NAME: f"{json.dumps({**config, BASE_KEY: named}, indent=2)}\n".encode(),
        CARD_NAME: theirs.encode(),
        REPORT_NAME: public.report.to_json().encode(),
    }
    changes = [Change(CONFIG_NAME, BASE_KEY, str(config.get(BASE_KEY)), str(named))]
    changes += _changed_lines(CARD_NAME, card, theirs)
    changes += _changed_lines(REPORT_NAME, report.to_json(), public.report.to_json())
    told = (
        f"the base is not named, as {report.totals['base']['name']} is a place on this machine; give --base OWNER/NAME"
    )
    return _completed(replace(prepared, notes=() if named else (told,)), found, rewritten, changes, there)


def _refuse_base(directory: Path, base: str | None) -> None:
    if base is not None:
        raise ReportError(f"--base: is about an adapter alone, and {directory} holds its base; leave it out")


def _completed(
    prepared: Prepared, found: dict[str, str], rewritten: dict[str, bytes], changes: list[Change], there: list[str]
) -> Prepared:
    """Return it with all that is pushed: the files that were `found`, with their sums, and those made anew."""
    found |= {name: bytes_sum(content) for name, content in rewritten.items()}
    rewritten[MANIFEST_NAME] = manifest_text(found).encode()
    sizes = {name: prepared.source(name).stat().st_size for name in found.keys() - rewritten.keys()}
    sizes |= {name: len(content) for name, content in rewritten.items()}
    left_out = [name for name in there if name not in sizes]
    adapter = prepared.trained
    if adapter is not None and adapter.resolve() != prepared.directory.resolve():
        left_out += [str(adapter / name) for name in _others(adapter)]
    files, left = dict(sorted(sizes.items())), tuple(left_out)
    return replace(prepared, files=files, rewritten=rewritten, changes=tuple(changes), left_out=left)


def _trained_alone(directory: Path, repo_id: str) -> str:
    """Say how an adapter that `qinit snndlft` trained gets to the Hub."""
    base = read_json(directory / CONFIG_NAME, "so this is no whole training; run `qinit snndlft` again").get(BASE_KEY)
    first = f"name a base on the Hub under {BASE_KEY} in {CONFIG_NAME}, and " if Path(str(base)).is_absolute() else ""
    upload = f"push it with `hf upload {repo_id} {directory}`"
    return f"{directory}: holds an adapter alone, for the base {base}; {first}{upload}"


def _prepare_merge(directory: Path, repo_id: str, adapter: Path | None) -> Prepared:
    if adapter is not None:
        raise ReportError(f"{directory}: is a merge, so that an adapter is in it already; leave --adapter out")
    report, sums, there = MergeReport.read(directory), read_manifest(directory), listed(directory)
    for name in (*sums, "config.json"):
        if name not in there:
            raise ReportError(f"{directory / name}: missing, so this is no whole merge; run `qinit merge` again")
    found = _sums(directory, sorted(sums), sums)
    prepared = Prepared(directory, repo_id, report, {}, {}, (), ())
    rewritten: dict[str, bytes] = {}
    changes: list[Change] = []
    if CARD_NAME in sums:
        card = (directory / CARD_NAME).read_bytes().decode("utf-8", "replace")
        rewritten[CARD_NAME] = on_hub(card, report, repo_id).encode()
        changes = _changed_lines(CARD_NAME, card, rewritten[CARD_NAME].decode())
    return _completed(prepared, found, rewritten, changes, there)


def _sums(directory: Path, names: list[str], sums: dict[str, str]) -> dict[str, str]:
    """Return the sums of the files. Raises ReportError for one that is not as it was listed; the card may have been
    changed by hand."""
    found = {name: _sum(directory / name) for name in names}
    for name, value in sums.items():
        if name in found and found[name] != value and name != CARD_NAME:
            raise ReportError(_changed(directory, name))
    return found


def _require_fit(adapter: Path, directory: Path, report: Report) -> None:
    layers = {row.name: row.shape for row in report.layers}
    place = Path(report.totals["base"]["name"]) if is_adapter(report) else directory
    files = [file for file, _ in weight_files(place)] if place.is_dir() else []
    base = [name for file in files for name in read_header(file)] or [f"{name}.weight" for name in layers]
    for problem in misfits(adapter, layers, base):
        raise CheckpointError(f"{adapter}: does not fit the base of {directory}: {problem}; give the run that it is of")


def _others(adapter: Path) -> list[str]:
    """Return what lies beside a trained adapter: a trainer's state, checkpoints, what it says of itself."""
    return sorted(path.name for path in adapter.iterdir() if path.name not in (CONFIG_NAME, WEIGHTS_NAME))


def _is_state(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix in STATE_SUFFIXES or path.parts[0].startswith("checkpoint-")


def _changed(directory: Path, name: str) -> str:
    alone = name in (CONFIG_NAME, WEIGHTS_NAME)
    trained = (
        f"; if it was trained there, push it with --adapter {directory if alone else directory / ADAPTER_DIRECTORY}"
    )
    return (
        f"{directory / name}: is not what the run wrote (its sum is not the one in {MANIFEST_NAME}); run "
        f"`qinit eqft` again, or remove {MANIFEST_NAME} if you changed it on purpose"
        + (trained if alone or name.startswith(f"{ADAPTER_DIRECTORY}/") else "")
    )


def _changed_lines(file: str, before: str, after: str) -> list[Change]:
    old, new = before.splitlines(), after.splitlines()
    steps = SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    return [
        Change(file, f"line {i + 1}", " / ".join(old[i:i_end]), " / ".join(new[j:j_end]))
        for kind, i, i_end, j, j_end in steps
        if kind != "equal"
    ]


def _sum(file: Path) -> str:
    try:
        return file_sum(file)
    except OSError as error:
        raise ReportError(f"{file}: cannot be read ({error.strerror})") from None
