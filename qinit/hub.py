"""The Hub: a model id becomes a local directory. The only module that uses the network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qinit.errors import CheckpointError, HubError

# Other forms of the same weights, never fetched beside safetensors; "original/" holds Meta's.
SKIPPED = [
    *("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx*", "*.ot", "*.npz", "*.tflite"),
    *("original/*", "consolidated*"),
]


def local_directory(model: str, revision: str | None = None, token: str | None = None) -> Path:
    """Return `model` itself if it is a directory, else download that Hub id (or find it in the cache).

    Raises CheckpointError for something that is neither, HubError for what the Hub answers.
    """
    try:
        is_directory, is_file = Path(model).is_dir(), Path(model).is_file()
    except OSError as error:
        raise CheckpointError(f"{model}: cannot be looked at ({error.strerror})") from None
    if is_directory:
        if revision:
            raise CheckpointError(f"{model}: is a local directory, which has no revision '{revision}'; leave it out")
        return Path(model)
    if is_file:
        raise CheckpointError(f"{model}: is a file; give the directory that holds config.json and the weights")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith((".", "/", "~")):
        raise CheckpointError(f"{model}: no such directory, and no Hub id (those look like 'Qwen/Qwen2.5-0.5B')")
    from huggingface_hub import errors, get_token, snapshot_download

    at = f"{model} at revision {revision}" if revision else model
    token = token.strip() if token else None
    if not re.fullmatch("[!-~]*", token or get_token() or ""):  # it would end up in the HTTP client's own error
        raise HubError(f"{at}: the Hub token holds characters that no token has; check HF_TOKEN or --token")
    try:
        directory = Path(snapshot_download(model, revision=revision, token=token, ignore_patterns=SKIPPED))
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
    except (OSError, errors.HTTPError) as error:  # a broken connection, a full disk
        reason = str(error).replace(token, "***") if token else str(error)
        raise HubError(f"{at}: the download failed ({type(error).__name__}: {reason})") from None
    if not any(directory.glob("*.safetensors")):
        raise CheckpointError(
            f"{at}: the Hub has no safetensors weights of it, and pickle weights can run code when read; convert them "
            "where you trust them: AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(NEW_DIR)"
        )
    return directory


def _refusal(at: str, error: Any) -> HubError:
    status = error.response.status_code if error.response is not None else "unknown"
    advice = "check HF_TOKEN or --token" if status in (401, 403) else "try again later"
    return HubError(f"{at}: the Hub answered with status {status}; {advice}")
