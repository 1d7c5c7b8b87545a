"""What the Hub, and the way to it, can answer: errors of one line that do not hold the token."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from qinit.errors import CheckpointError, HubError, QinitError

UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)  # by a reply that is no Hub's
LONGEST = 300  # of what the Hub says itself; some proxies answer with a page


def checked_token(subject: str, token: str | None) -> str | None:
    """Return the token as it is sent: without the line end of a file it was read from, None for huggingface_hub's own.

    Raises HubError, which names `subject`, for one that cannot be sent.
    """
    from huggingface_hub import get_token

    token = token.strip() if token else None
    if not re.fullmatch("[!-~]*", token or get_token() or ""):  # it would end up in the HTTP client's own error
        raise HubError(f"{subject}: the Hub token holds characters that no token has; check HF_TOKEN or --token")
    return token or None


def without_token(text: str, token: str | None) -> str:
    """Return a text as one line, with *** for the token that was given and for the one that huggingface_hub knows."""
    from huggingface_hub import get_token

    for secret in filter(None, (token, get_token())):
        text = text.replace(secret, "***")
    return " ".join(text.split())


def at_revision(repo_id: str, revision: str | None) -> str:
    return f"{repo_id} at revision {revision}" if revision else repo_id


@contextmanager
def hub_errors(
    repo_id: str, revision: str | None, token: str | None, doing: Literal["download", "push"] = "download"
) -> Iterator[None]:
    """Turn what huggingface_hub raises into HubError, and a name that cannot be a Hub id into CheckpointError."""
    from huggingface_hub import errors

    try:
        yield
    except (OSError, errors.HTTPError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _translated(error, repo_id, revision, token, doing) from None


def _translated(error: BaseException, repo_id: str, revision: str | None, token: str | None, doing: str) -> QinitError:
    from huggingface_hub import errors

    at = at_revision(repo_id, revision)
    if isinstance(error, errors.HFValidationError):
        return CheckpointError(f"{repo_id}: no such directory, and no Hub id ({error})")
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            return _refusal(error.__cause__, repo_id, revision, token, doing)
        return HubError(
            f"{at}: no such directory here, not in the local cache, and the Hub cannot be reached; "
            "check the name and the network, or give a local directory"
        )
    if isinstance(error, errors.HfHubHTTPError):
        return _refusal(error, repo_id, revision, token, doing)
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, errors.HTTPError | OSError):
        return _translated(error.__cause__, repo_id, revision, token, doing)  # names the file, not the reason
    reason = without_token(str(error), token)[:LONGEST]
    if doing == "download" and isinstance(error, UNREADABLE):
        return HubError(f"{at}: the Hub's answer cannot be used ({type(error).__name__}: {reason})")
    return HubError(f"{at}: the {doing} failed ({type(error).__name__}: {reason})")  # a broken connection, a full disk


def _refusal(error: Any, repo_id: str, revision: str | None, token: str | None, doing: str) -> HubError:
    from huggingface_hub import errors

    at, pushing = at_revision(repo_id, revision), doing == "push"
    status = error.response.status_code if error.response is not None else "unknown"
    if isinstance(error, errors.GatedRepoError):
        return HubError(f"{at}: access is gated; ask for it on its page and set HF_TOKEN")
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{repo_id}: the Hub has no revision '{revision}' of it")
    if isinstance(error, errors.RepositoryNotFoundError) and not (pushing and status == 401):
        what = "no such repository" if pushing else "no such directory here and no such model"
        return HubError(f"{at}: {what} on the Hub (a private one needs HF_TOKEN)")
    advice = "try again later"
    if status in (401, 403):
        advice = "check HF_TOKEN or --token" + (", which must be allowed to write there" if pushing else "")
    elif status == 409:
        advice = "something else changed it meanwhile; try again"
    elif status == 429:
        wait = error.response.headers.get("Retry-After", "")
        advice = f"too many requests; try again in {wait} s" if wait.isdigit() else "too many requests; try again later"
    said = without_token(str(getattr(error, "server_message", None) or ""), token)[:LONGEST]
    return HubError(f"{at}: the Hub answered with status {status}{f' ({said})' if said else ''}; {advice}")
