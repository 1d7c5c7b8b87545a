"""Puts what was prepared on the Hub, so that the repo id alone loads base and adapter.

It is done by huggingface_hub's `upload_folder`, which took the place of `upload_large_folder`: each request is tried
again, and what the Hub has already is not sent again.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from urllib.parse import quote

from qinit.adapters import ADAPTER_DIRECTORY, CONFIG_NAME
from qinit.errors import HubError
from qinit.hub.errors import checked_token, hub_errors
from qinit.hub.prepare import CARD_NAME, Prepared, require_name
from qinit.report.card import TRAINED_DIRECTORY
from qinit.report.pictures.files import PICTURES
from qinit.report.report import REPORT_NAME

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# What an earlier push of another run may have left there: it would be loaded, or believed, beside the new one.
REPLACED = ("*.gguf", "*.safetensors", "*.safetensors.index.json", CONFIG_NAME, "sensitivity.json", *PICTURES)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")


@dataclass(frozen=True)
class Pushed:
    """Where it is now: `revision` is None for the main branch, `pull_request` the address of one that was opened."""

    url: str
    revision: str | None
    pull_request: str | None


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
