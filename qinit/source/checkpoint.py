"""A Hugging Face checkpoint on disk: configuration, headers, and tensors read one at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qinit.errors import CheckpointError
from qinit.files.reading import JSON_BYTES, UnfitError, parse_json, parse_yaml, printable, read_regular, require_inside
from qinit.files.tensors import INDEX_NAME, StoredTensor, read_header
from qinit.machine import CPU

SINGLE_NAME = "model.safetensors"
# Never copied beside a quantized base: other forms of the same weights.
WEIGHT_SUFFIXES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ot", ".npz"),
    *(".onnx", ".onnx_data", ".tflite"),
}
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}
# Never copied either: what a run writes anew, or an earlier one has written about itself.
WRITTEN = {"config.json", "README.md", "qinit.json", "sensitivity.json", "SHA256SUMS", "eqft_init"}
ADAPTER_CONFIG = "adapter_config.json"
MAX_FILES = 10_000  # beside the weights; a model has some dozens


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: `tensors` maps each name to its place; nothing is read until asked for."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, directory: Path, *, quantized: bool = False) -> Checkpoint:
        """Read config.json and all headers of a local directory.

        Raises CheckpointError for anything missing, damaged, pickled or, unless `quantized`, already quantized.
        """
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: no such directory")
        _require_plain(directory / "config.json", directory)
        config = read_json(directory / "config.json", "a model directory has one; is this the right directory?")
        found = config.get("quantization_config")
        if found is not None and not quantized:
            how = found.get("quant_method", "unknown") if isinstance(found, dict) else "unknown"
            raise CheckpointError(
                f"{directory / 'config.json'}: the checkpoint is already quantized (quant_method {how}); "
                "give the full-precision model that it was made from"
            )
        if (directory / ADAPTER_CONFIG).is_file():
            raise CheckpointError(
                f"{directory / ADAPTER_CONFIG}: lies beside the model, so that transformers would load the model that "
                "it names instead; move it away, or give the directory of the merged model"
            )
        tensors: dict[str, StoredTensor] = {}
        for file, expected in weight_files(directory):
            header = read_header(file)
            for name in expected or ():
                if name not in header:
                    raise CheckpointError(f"{file}: lacks tensor '{name}', which {INDEX_NAME} places there")
            tensors.update({name: header[name] for name in expected or header})
        if not tensors:
            raise CheckpointError(f"{directory}: its safetensors hold no tensors")
        checkpoint = cls(directory, config, tensors)
        checkpoint.companion_bytes()  # what must not be carried along is found before anything starts
        return checkpoint

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def parameters(self) -> int:
        """How many values the weights have together."""
        return sum(tensor.numel for tensor in self.tensors.values())

    def companions(self) -> Iterator[Path]:
        """Yield, relative to the directory, every file to carry along: all but weights, caches and the card.

        Python files travel only with a checkpoint whose configuration refers to code (`auto_map`). Raises
        CheckpointError for a link that leads out of the directory, as what it points to would be published with the
        model, for names that cannot be printed, and for very many files.
        """
        count = 0
        for parent, directories, names in os.walk(self.directory):
            directories[:] = sorted(name for name in directories if not _hidden(name))
            for name in sorted(names):
                path = Path(parent, name)
                relative = path.relative_to(self.directory)
                if _hidden(name) or relative.parts[0] in WRITTEN or not path.is_file() or _is_weights(path):
                    continue
                if name == ADAPTER_CONFIG:
                    continue  # an adapter without its weights; transformers would follow it away from this base
                if path.suffix == ".py" and "auto_map" not in self.config:
                    continue
                count += 1
                if count > MAX_FILES:
                    raise CheckpointError(
                        f"{self.directory}: holds more than {MAX_FILES} files beside its weights, which would all "
                        "be copied; give the directory of one model"
                    )
                _require_plain(path, self.directory)
                yield relative

    def companion_bytes(self) -> int:
        """Return how much the companions take on disk. Raises what `companions` does."""
        return sum((self.directory / relative).stat().st_size for relative in self.companions())

    def card_metadata(self) -> dict[str, Any]:
        """Return the YAML front matter of the source's own model card, or nothing."""
        path = self.directory / "README.md"
        try:
            require_inside(path, self.directory)
            before, front, _ = read_regular(path, JSON_BYTES).decode("utf-8").split("---\n", 2)
            metadata = parse_yaml(front.encode())
        except (OSError, ValueError):
            return {}
        return metadata if not before and isinstance(metadata, dict) else {}


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def _is_weights(path: Path) -> bool:
    return path.suffix in WEIGHT_SUFFIXES or path.name.endswith((".safetensors.index.json", ".bin.index.json"))


def _require_plain(path: Path, directory: Path) -> None:
    """Raise CheckpointError for a file that leads out of the directory or cannot be named; not for a missing one."""
    try:
        require_inside(path, directory)
        name = str(path.relative_to(directory))
        if printable(name) != name:
            raise UnfitError("its name holds characters that cannot be printed; rename it")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None


def read_json(path: Path, missing: str) -> dict[str, Any]:
    """Read a JSON object; `missing` is the advice when there is no such file."""
    try:
        value = parse_json(read_regular(path, JSON_BYTES))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found; {missing}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def weight_files(directory: Path) -> list[tuple[Path, list[str] | None]]:
    """Return each weight file with the tensors expected in it (None: all); the same order of preference
    as transformers: a single file before an index. Raises CheckpointError when one is missing."""
    single = directory / SINGLE_NAME
    if os.path.lexists(single):
        _require_file(single, directory, "a file of that name is taken before an index")
        return [(single, None)]
    by_file = indexed_files(directory)
    for file_name, names in by_file.items():
        advice = f"{INDEX_NAME} places {len(names)} tensors there; the download may be incomplete"
        _require_file(directory / file_name, directory, advice)
    return [(directory / file_name, names) for file_name, names in sorted(by_file.items())]


def _require_file(path: Path, directory: Path, advice: str) -> None:
    _require_plain(path, directory)
    if not path.is_file():
        what = "not a regular file" if path.exists() else "missing"
        raise CheckpointError(f"{path}: {what}, but {advice}")


def indexed_files(directory: Path) -> dict[str, list[str]]:
    """Return the names of the weight files that the index lists, each with its tensors; the files may be missing."""
    index = directory / INDEX_NAME
    _require_plain(index, directory)
    if not os.path.lexists(index):
        pickles = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise CheckpointError(
                f"{directory}: only pickle weights ({', '.join(pickles[:3])}), which can run code when read; convert "
                "them where you trust them: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
            )
        raise CheckpointError(f"{directory}: neither {SINGLE_NAME} nor {INDEX_NAME}; nothing to quantize")
    weight_map = read_json(index, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    by_file: dict[str, list[str]] = {}
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not _plain_name(file_name):
            raise CheckpointError(f"{index}: '{name}' is placed in {file_name!r}, which is no plain file name")
        by_file.setdefault(file_name, []).append(name)
    return by_file


def _plain_name(name: str) -> bool:
    return 0 < len(name) < 256 and Path(name).name == name != ".." and printable(name) == name


def count_nonfinite(tensor: torch.Tensor) -> int:
    """Return how many values are NaN or Inf."""
    # The sum is finite unless a value is not (or values near the type's limit add up): one cheap pass, in the tensor's
    # own type, as a sum in another one copies it first.
    own = torch.float32 if tensor.dtype.itemsize == 1 else None
    if not tensor.is_floating_point() or torch.isfinite(tensor.sum(dtype=own)):
        return 0
    return int((~torch.isfinite(tensor.float() if tensor.dtype.itemsize == 1 else tensor)).sum())


def read_finite(tensor: StoredTensor, device: torch.device = CPU) -> torch.Tensor:
    """Read a tensor in its stored dtype, to the device; raises CheckpointError for NaN and Inf."""
    raw = tensor.read(device)
    require_finite(tensor, count_nonfinite(raw))
    return raw


def require_finite(tensor: StoredTensor, bad: int) -> None:
    """Raise CheckpointError when `bad` of a tensor's values are NaN or Inf."""
    if bad:
        raise CheckpointError(
            f"{tensor.file}: tensor '{tensor.name}' holds {bad} NaN or Inf among {tensor.numel} values; "
            "the file is damaged or was saved after a diverged run"
        )


def not_decomposable(tensor: StoredTensor, weight: torch.Tensor) -> CheckpointError:
    """Return the error for a finite weight whose decomposition fails."""
    return CheckpointError(
        f"{tensor.file}: tensor '{tensor.name}' cannot be decomposed; its values go up to "
        f"{float(weight.abs().max()):.1e}, squares of which overflow in float32: is the file damaged?"
    )
