"""The Hub: a model id becomes a local directory. Beside `calibration/hub_documents.py` the only use of the network."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qinit.checkpoint import SINGLE_NAME, indexed_files, weight_files
from qinit.errors import CheckpointError, HubError
from qinit.safetensors_io import raw_header, write_header_only

# Other forms of the same weights, never fetched beside safetensors; "original/" holds Meta's.
SKIPPED = [
    *("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx*", "*.ot", "*.npz", "*.tflite"),
    *("original/*", "consolidated*"),
]
NO_HEADERS = [*SKIPPED, "*.safetensors", "*/*"]  # nothing that a plan needs lies in a directory of its own
CONNECTIONS = 8

_temporary: list[TemporaryDirectory[str]] = []  # removed when the process ends


def local_directory(model: str, revision: str | None = None, token: str | None = None) -> Path:
    """Return `model` itself if it is a directory, else download that Hub id (or find it in the cache).

    Raises CheckpointError for something that is neither, HubError for what the Hub answers.
    """
    directory = _given_directory(model, revision)
    if directory is None:
        directory = _download(model, revision, token, SKIPPED)
        _require_safetensors(model, revision, [path.name for path in directory.iterdir()])
    return directory


def header_directory(model: str, revision: str | None = None, token: str | None = None) -> Path:
    """Return a directory to plan with: `model` itself if it is one, the cache if it holds that Hub id whole, else a
    temporary one with the Hub id's configuration and tokenizer and, of its weights, the headers only.

    Of each weight file, the first 100 kB (more where the header is longer) are fetched. The temporary directory is
    removed when the process ends, and reading a tensor from it raises. Raises what `local_directory` does.
    """
    given = _given_directory(model, revision)
    if given is not None:
        return given
    from huggingface_hub import HfApi

    cached = _download(model, revision, token, NO_HEADERS)
    try:
        weight_files(cached)
        return cached
    except CheckpointError:
        pass  # not whole: the usual case
    api, commit = HfApi(token=_stripped(token)), cached.name
    with _hub_errors(model, revision, token):
        files = api.list_repo_files(model, revision=commit)
    _require_safetensors(model, revision, files)
    # What is not among the files is left for Checkpoint.open to miss.
    wanted = {SINGLE_NAME} if SINGLE_NAME in files else indexed_files(cached).keys() & set(files)
    missing = sorted(name for name in wanted if not (cached / name).is_file())

    def fetch(name: str) -> dict[str, Any]:
        return _fetch_header(api, model, commit, name)

    with _hub_errors(model, revision, token):
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            headers = list(pool.map(fetch, missing))
        directory = _temporary_directory(model)
        for path in cached.iterdir():
            if path.name in wanted:
                write_header_only(directory / path.name, raw_header(path)[0])
            elif path.is_file() and path.suffix != ".safetensors":
                shutil.copyfile(path, directory / path.name)
        for name, header in zip(missing, headers, strict=True):
            write_header_only(directory / name, header)
    return directory


def _given_directory(model: str, revision: str | None) -> Path | None:
    """Return `model` if it is a directory, None if it may be a Hub id; raises CheckpointError if it is neither."""
    try:
        is_directory, is_file = Path(model).is_dir(), Path(model).is_file()
    except OSError as error:
        raise CheckpointError(f"{model}: cannot be looked at ({error.strerror})") from None
    if revision and (".." in revision or not re.fullmatch(r"[\w./+@-]+", revision)):  # it becomes a path in the cache
        raise HubError(f"{model}: no branch, tag or commit is named so: '{revision}'")
    if is_directory:
        if revision:
            raise CheckpointError(f"{model}: is a local directory, which has no revision '{revision}'; leave it out")
        return Path(model)
    if is_file:
        raise CheckpointError(f"{model}: is a file; give the directory that holds config.json and the weights")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith((".", "/", "~")):
        raise CheckpointError(f"{model}: no such directory, and no Hub id (those look like 'Qwen/Qwen2.5-0.5B')")
    return None


def _download(model: str, revision: str | None, token: str | None, skipped: list[str]) -> Path:
    """Fetch a repository without the files that `skipped` matches into the Hub's cache, or find it there."""
    from huggingface_hub import get_token, snapshot_download

    token = _stripped(token)
    if not re.fullmatch("[!-~]*", token or get_token() or ""):  # it would end up in the HTTP client's own error
        raise HubError(
            f"{_at(model, revision)}: the Hub token holds characters that no token has; check HF_TOKEN or --token"
        )
    with _hub_errors(model, revision, token):
        directory = Path(snapshot_download(model, revision=revision, token=token, ignore_patterns=skipped))
        if ".." in directory.parts:  # the commit's name is the Hub's word
            raise ValueError(f"commit '{directory}'")
    return directory


def _fetch_header(api: Any, model: str, commit: str, name: str) -> dict[str, Any]:
    """Fetch the header of one weight file; raises CheckpointError for one that cannot be read."""
    from huggingface_hub.errors import HfHubHTTPError, SafetensorsParsingError

    try:
        found = api.parse_safetensors_file_metadata(model, name, revision=commit)
    except HfHubHTTPError:  # one of them is a ValueError
        raise
    except (SafetensorsParsingError, AttributeError, TypeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{model}: {name} on the Hub has no header that qinit reads ({reason})") from None
    entries = {
        key: {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": tensor.data_offsets}
        for key, tensor in found.tensors.items()
    }
    return {"__metadata__": found.metadata, **entries}


def _temporary_directory(model: str) -> Path:
    """Make a directory that is removed when the process ends."""
    made = TemporaryDirectory(prefix=f"qinit-headers-{model.replace('/', '--')}-", ignore_cleanup_errors=True)
    _temporary.append(made)
    return Path(made.name)


@contextmanager
def _hub_errors(model: str, revision: str | None, token: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into errors of one line that do not hold the token."""
    from huggingface_hub import errors, get_token

    at = _at(model, revision)
    try:
        yield
    except errors.GatedRepoError:
        raise HubError(f"{at}: access is gated; ask for it on its page and set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{model}: the Hub has no revision '{revision}' of it") from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"{at}: no such directory here and no such model on the Hub (a private one needs HF_TOKEN)"
        ) from None
    except errors.HFValidationError as error:
        raise CheckpointError(f"{model}: no such directory, and no Hub id ({error})") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise _refusal(at, error.__cause__) from None
        raise HubError(
            f"{at}: no such directory here, not in the local cache, and the Hub cannot be reached; "
            "check the name and the network, or give a local directory"
        ) from None
    except errors.HfHubHTTPError as error:
        raise _refusal(at, error) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # a reply that is no Hub's
        reason = " ".join(str(error).split())[:300]
        raise HubError(f"{at}: the Hub's answer cannot be used ({type(error).__name__}: {reason})") from None
    except (OSError, errors.HTTPError) as error:  # a broken connection, a full disk
        reason, secret = str(error), _stripped(token) or get_token()
        if secret:
            reason = reason.replace(secret, "***")
        raise HubError(f"{at}: the download failed ({type(error).__name__}: {reason})") from None


def _require_safetensors(model: str, revision: str | None, files: list[str]) -> None:
    if not any(file.endswith(".safetensors") and "/" not in file for file in files):
        raise CheckpointError(
            f"{_at(model, revision)}: the Hub has no safetensors weights of it, and pickle weights can run code when "
            "read; convert them where you trust them: "
            "AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(NEW_DIR)"
        )


def _at(model: str, revision: str | None) -> str:
    return f"{model} at revision {revision}" if revision else model


def _stripped(token: str | None) -> str | None:
    return token.strip() if token else None


def _refusal(at: str, error: Any) -> HubError:
    status = error.response.status_code if error.response is not None else "unknown"
    advice = "check HF_TOKEN or --token" if status in (401, 403) else "try again later"
    return HubError(f"{at}: the Hub answered with status {status}; {advice}")
