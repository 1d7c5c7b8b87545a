"""Puts a finished run on the Hub, so that the repo id alone loads base and adapter. The run itself is only read.

What is pushed differs from the directory in three files, which are made anew: the adapter's configuration and the card
name the repo id, and SHA256SUMS is the list of what is pushed. An adapter that was trained takes the place of the run's
own, in another folder; of what its trainer has saved beside it, nothing is pushed. It is done by huggingface_hub's
`upload_folder`, which took the place of `upload_large_folder`: each request is tried again, and what the Hub has
already is not sent again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from glob import escape
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from urllib.parse import quote

from qinit.adapters import ADAPTER_DIRECTORY, CONFIG_NAME
from qinit.adapters.trained import WEIGHTS_NAME, misfits
from qinit.errors import CheckpointError, HubError, ReportError
from qinit.files.manifest import MANIFEST_NAME, bytes_sum, file_sum, listed, manifest_text, read_manifest
from qinit.files.tensors import read_header
from qinit.hub.errors import checked_token, hub_errors
from qinit.report.adapter_card import require_base
from qinit.report.card import TRAINED_DIRECTORY, hub_card, snippet_of
from qinit.report.exported import download_lines, hub_export_card
from qinit.report.merged import MergeReport, is_merge, merged_snippet, on_hub
from qinit.report.pictures.files import PICTURES
from qinit.report.report import REPORT_NAME, Report, is_training
from qinit.source.checkpoint import read_json, weight_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD_NAME = "README.md"
ADAPTER_CONFIG = f"{ADAPTER_DIRECTORY}/{CONFIG_NAME}"
BASE_KEY = "base_model_name_or_path"
# What an earlier push of another run may have left there: it would be loaded, or believed, beside the new one.
REPLACED = ("*.gguf", "*.safetensors", "*.safetensors.index.json", CONFIG_NAME, "sensitivity.json", *PICTURES)
# What a trainer leaves in a directory, some of it pickles: no part of a run, with SHA256SUMS or without.
STATE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")


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
        return snippet_of(self.report, self.repo_id, on_hub=True, revision=revision, trained=self.trained is not None)

    def source(self, name: str) -> Path:
        """Return the file that is pushed under this name, unless it is made anew."""
        path = PurePosixPath(name)
        if self.trained is not None and str(path.parent) == TRAINED_DIRECTORY:
            return self.trained / path.name
        return self.directory / name


@dataclass(frozen=True)
class Pushed:
    """Where it is now: `revision` is None for the main branch, `pull_request` the address of one that was opened."""

    url: str
    revision: str | None
    pull_request: str | None


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


def require_ready(repo_id: str, token: str | None) -> None:
    """Raise HubError for what forbids a push without asking the Hub: the name, no token, HF_HUB_OFFLINE."""
    from huggingface_hub import constants, get_token

    require_name(repo_id)
    if not (checked_token(repo_id, token) or get_token()):
        raise HubError(f"{repo_id}: a push needs a Hub token; set HF_TOKEN, or log in with `hf auth login`")
    if constants.HF_HUB_OFFLINE:
        raise HubError(f"{repo_id}: HF_HUB_OFFLINE is set, so nothing can be pushed; unset it")


def open_target(
    repo_id: str, *, revision: str | None = None, private: bool = False, create_pr: bool = False, token: str | None
) -> list[str]:
    """Make the repository and the branch where they are missing, and make sure that this token may write there.

    Returns the names of the files that are there. Raises HubError, also for a repository that holds weights which
    qinit did not push, and for one that is public where `private` is asked for.
    """
    require_ready(repo_id, token)
    from huggingface_hub import CommitOperationAdd

    api = _api(repo_id, token)
    with hub_errors(repo_id, revision, token, "push"):
        if not create_pr:
            api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo_id).private:
            raise HubError(f"{repo_id}: is public already; make it private on its page, or leave --private out")
        if revision and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        # A small text file is no upload: this only asks whether one would be taken.
        probe = CommitOperationAdd(CARD_NAME, b"# qinit\n")
        api.preupload_lfs_files(repo_id, [probe], revision=revision, create_pr=create_pr)
        files = api.list_repo_files(repo_id, revision=revision)
    is_proposal = create_pr or (revision or "").startswith("refs/pr/")
    theirs = [file for file in files if file.endswith(WEIGHT_SUFFIXES)]
    if theirs and REPORT_NAME not in files and not is_proposal:
        raise HubError(
            f"{repo_id}: holds {theirs[0]} and no {REPORT_NAME}, so qinit did not push it and will not replace it; "
            "choose another name, or propose it with --create-pr"
        )
    return files


def prepare(directory: Path, repo_id: str, adapter: Path | None = None) -> Prepared:
    """Read a run's directory or an export's, check every file against its SHA256SUMS, and make what differs on the Hub.

    Only the card may have been changed by hand. `adapter`, the directory of an adapter that was trained on the run,
    takes the place of the run's own. Raises HubError for what is no OWNER/NAME, ReportError or CheckpointError for a
    directory that is no finished run, or one with a file that is missing or not what the run wrote, and for an adapter
    that does not fit. A merge, which has no adapter, is pushed as it is.
    """
    require_name(repo_id)
    if is_merge(directory):
        return _prepare_merge(directory, repo_id, adapter)
    if is_training(directory):
        raise ReportError(_alone(directory, repo_id))
    report = Report.read(directory)
    require_base(report, directory, "push it with `hf upload`, as the Hub has adapters")
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
        rewritten[CARD_NAME] = theirs.encode()
        changes += _changed_lines(CARD_NAME, card, theirs)
    found |= {name: bytes_sum(content) for name, content in rewritten.items()}
    rewritten[MANIFEST_NAME] = manifest_text(found).encode()
    sizes = {name: prepared.source(name).stat().st_size for name in found.keys() - rewritten.keys()}
    sizes |= {name: len(content) for name, content in rewritten.items()}
    left_out = [name for name in there if name not in sizes]
    left_out += [str(adapter / name) for name in _others(adapter)] if adapter is not None else []
    return replace(
        prepared,
        files=dict(sorted(sizes.items())),
        rewritten=rewritten,
        changes=tuple(changes),
        left_out=tuple(left_out),
    )


def _alone(directory: Path, repo_id: str) -> str:
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
    prepared = Prepared(directory, repo_id, report, {}, {}, (), tuple(name for name in there if name not in sums))
    rewritten: dict[str, bytes] = {}
    changes: list[Change] = []
    if CARD_NAME in sums:
        card = (directory / CARD_NAME).read_bytes().decode("utf-8", "replace")
        rewritten[CARD_NAME] = on_hub(card, report, repo_id).encode()
        changes = _changed_lines(CARD_NAME, card, rewritten[CARD_NAME].decode())
    found |= {name: bytes_sum(content) for name, content in rewritten.items()}
    rewritten[MANIFEST_NAME] = manifest_text(found).encode()
    sizes = {name: (directory / name).stat().st_size for name in found.keys() - rewritten.keys()}
    sizes |= {name: len(content) for name, content in rewritten.items()}
    return replace(prepared, files=dict(sorted(sizes.items())), rewritten=rewritten, changes=tuple(changes))


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
    base = [name for file, _ in weight_files(directory) for name in read_header(file)]
    for problem in misfits(adapter, layers, base):
        raise CheckpointError(f"{adapter}: does not fit the base of {directory}: {problem}; give the run that it is of")


def _others(adapter: Path) -> list[str]:
    """Return what lies beside a trained adapter: a trainer's state, checkpoints, what it says of itself."""
    return sorted(path.name for path in adapter.iterdir() if path.name not in (CONFIG_NAME, WEIGHTS_NAME))


def _is_state(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix in STATE_SUFFIXES or path.parts[0].startswith("checkpoint-")


def _changed(directory: Path, name: str) -> str:
    trained = f"; if it was trained there, push it with --adapter {directory / ADAPTER_DIRECTORY}"
    return (
        f"{directory / name}: is not what the run wrote (its sum is not the one in {MANIFEST_NAME}); run "
        f"`qinit eqft` again, or remove {MANIFEST_NAME} if you changed it on purpose"
        + (trained if name.startswith(f"{ADAPTER_DIRECTORY}/") else "")
    )


def push(
    prepared: Prepared,
    *,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    token: str | None = None,
) -> Pushed:
    """Send what was prepared to the Hub: to the main branch, to `revision`, or to a new pull request.

    Raises HubError; what the Hub has by then is not sent again the next time.
    """
    repo_id = prepared.repo_id
    files = open_target(repo_id, revision=revision, private=private, create_pr=create_pr, token=token)
    api, title = _api(repo_id, token), f"qinit: {prepared.report.method}, {len(prepared.files)} files"
    opened = None
    if create_pr:
        with hub_errors(repo_id, revision, token, "push"):
            opened = api.create_pull_request(repo_id, title)
            revision = opened.git_reference
    stale = [escape(name) for name in files if name not in prepared.files and _is_replaced(name)]
    try:
        with hub_errors(repo_id, revision, token, "push"), _staged(prepared) as folder:
            api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=title,
                delete_patterns=stale or None,
            )
    except HubError as error:
        if opened is not None:
            raise HubError(f"{error}; to go on in this pull request, push with --revision {revision}") from None
        raise
    branch = f"/tree/{quote(revision, safe='')}" if revision else ""
    return Pushed(f"{api.endpoint}/{repo_id}{branch}", revision, opened.url if opened else None)


def _api(repo_id: str, token: str | None) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(token=checked_token(repo_id, token), library_name="qinit")


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


def _is_replaced(name: str) -> bool:
    path = PurePosixPath(name)
    ours = str(path.parent) in (".", ADAPTER_DIRECTORY, TRAINED_DIRECTORY)
    return ours and any(path.match(pattern) for pattern in REPLACED)


@contextmanager
def _staged(prepared: Prepared) -> Iterator[Path]:
    """Give a temporary directory with what is pushed: links to the run's files, and the files that differ."""
    with TemporaryDirectory(prefix="qinit-push-") as made:
        for name in prepared.files:
            place = Path(made) / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if name in prepared.rewritten:
                place.write_bytes(prepared.rewritten[name])
            else:
                _link(prepared.source(name).resolve(), place)
        yield Path(made)


def _link(source: Path, place: Path) -> None:
    try:
        place.symlink_to(source)
    except OSError:  # Windows without the right to make links
        shutil.copyfile(source, place)
