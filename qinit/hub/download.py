"""The Hub: a model id becomes a local directory. Beside `push.py` and
`calibration/hub_documents.py` the only use of the network."""

from __future__ import annotations

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qinit.errors import CheckpointError, HubError
from qinit.files.tensors import raw_header, write_header_only
from qinit.hub.errors import at_revision, checked_token, hub_errors
from qinit.source.checkpoint import SINGLE_NAME, indexed_files, weight_files

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
    api, commit = HfApi(token=checked_token(model, token)), cached.name
    with hub_errors(model, revision, token):
        files = api.list_repo_files(model, revision=commit)
    _require_safetensors(model, revision, files)
    # What is not among the files is left for Checkpoint.open to miss.
    wanted = {SINGLE_NAME} if SINGLE_NAME in files else indexed_files(cached).keys() & set(files)
    missing = sorted(name for name in wanted if not (cached / name).is_file())

    def fetch(name: str) -> dict[str, Any]:
        return _fetch_header(api, model, commit, name)

    with hub_errors(model, revision, token):
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
    from huggingface_hub import snapshot_download

    token = checked_token(at_revision(model, revision), token)
    with hub_errors(model, revision, token):
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


def _require_safetensors(model: str, revision: str | None, files: list[str]) -> None:
    if not any(file.endswith(".safetensors") and "/" not in file for file in files):
        raise CheckpointError(
            f"{at_revision(model, revision)}: the Hub has no safetensors weights of it, and pickle weights can run "
            "code when read; convert them where you trust them: "
            "AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(NEW_DIR)"
        )
