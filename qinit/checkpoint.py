"""A Hugging Face checkpoint on disk: configuration, headers, and tensors read one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qinit.errors import CheckpointError
from qinit.safetensors_io import INDEX_NAME, StoredTensor, read_header

SINGLE_NAME = "model.safetensors"
# Never copied beside a quantized base: other forms of the same weights.
WEIGHT_SUFFIXES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ot", ".npz"),
    *(".onnx", ".onnx_data", ".tflite"),
}
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}


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
        config = read_json(directory / "config.json", "a model directory has one; is this the right directory?")
        found = config.get("quantization_config")
        if found is not None and not quantized:
            how = found.get("quant_method", "unknown") if isinstance(found, dict) else "unknown"
            raise CheckpointError(
                f"{directory / 'config.json'}: the checkpoint is already quantized (quant_method {how}); "
                "give the full-precision model that it was made from"
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
        return cls(directory, config, tensors)

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def companions(self) -> Iterator[Path]:
        """Yield, relative to the directory, every file to carry along: all but weights, caches and the card.

        Python files travel only with a checkpoint whose configuration refers to code (`auto_map`).
        """
        for path in sorted(self.directory.rglob("*")):
            relative = path.relative_to(self.directory)
            hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
            if hidden or not path.is_file() or path.suffix in WEIGHT_SUFFIXES:
                continue
            if relative.name.endswith((".safetensors.index.json", ".bin.index.json")):
                continue
            if relative.parts in (("config.json",), ("README.md",), ("qinit.json",)):
                continue  # written anew
            if relative.name == "adapter_config.json":
                continue  # an adapter without its weights; transformers would follow it away from this base
            if path.suffix != ".py" or "auto_map" in self.config:
                yield relative

    def card_metadata(self) -> dict[str, Any]:
        """Return the YAML front matter of the source's own model card, or nothing."""
        import yaml

        try:
            before, front, _ = (self.directory / "README.md").read_text(encoding="utf-8").split("---\n", 2)
            metadata = yaml.safe_load(front)
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        return metadata if not before and isinstance(metadata, dict) else {}


def read_json(path: Path, missing: str) -> dict[str, Any]:
    """Read a JSON object; `missing` is the advice when there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found; {missing}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def weight_files(directory: Path) -> list[tuple[Path, list[str] | None]]:
    """Return each weight file with the tensors expected in it (None: all); the same order of preference
    as transformers: a single file before an index. Raises CheckpointError when one is missing."""
    if (directory / SINGLE_NAME).is_file():
        return [(directory / SINGLE_NAME, None)]
    by_file = indexed_files(directory)
    for file_name, names in by_file.items():
        if not (directory / file_name).is_file():
            raise CheckpointError(
                f"{directory / file_name}: missing, but {INDEX_NAME} places {len(names)} tensors there; "
                "the download may be incomplete"
            )
    return [(directory / file_name, names) for file_name, names in sorted(by_file.items())]


def indexed_files(directory: Path) -> dict[str, list[str]]:
    """Return the names of the weight files that the index lists, each with its tensors; the files may be missing."""
    index = directory / INDEX_NAME
    if not index.is_file():
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
        if not isinstance(file_name, str) or Path(file_name).name != file_name or file_name in ("", ".", ".."):
            raise CheckpointError(f"{index}: '{name}' is placed in {file_name!r}, which is no plain file name")
        by_file.setdefault(file_name, []).append(name)
    return by_file


def count_nonfinite(tensor: torch.Tensor) -> int:
    """Return how many values are NaN or Inf."""
    # The sum is finite unless a value is not (or values near the type's limit add up): one cheap pass.
    if not tensor.is_floating_point() or torch.isfinite(tensor.sum(dtype=torch.float32)):
        return 0
    return int((~torch.isfinite(tensor.float() if tensor.dtype.itemsize == 1 else tensor)).sum())


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
