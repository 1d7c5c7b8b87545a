"""Models in memory, as transformers and PEFT load them, and whether they fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from io import StringIO
from math import prod
from typing import Any

import torch

from qinit.adapters import WEIGHTS_STEM
from qinit.evaluate.subject import Subject
from qinit.evaluate.windows import Windows
from qinit.files.tensors import read_header
from qinit.formats import format_of
from qinit.loading import load_parts
from qinit.report.report import REPORT_NAME
from qinit.source.checkpoint import Checkpoint, read_json
from qinit.source.skeleton import loader, without_cache

BATCH_BYTES = 1 << 29  # of a batch's logits, in float32
LARGEST_BATCH_TOKENS = 1 << 13  # beyond it a batch saves no time
LOGIT_COPIES = 3  # the model's own, and what becomes of a part of them
SHARE = 0.8  # of the free memory that models and logits may take


def load_model(subject: Subject, dtype: torch.dtype, device: torch.device) -> Any:
    """Load base and adapter in eval mode. Raises CheckpointError for what is damaged or needs a missing package."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # some kernels' packages print a banner
        model = _load(subject, dtype, device)
    without_cache(model)
    return model.eval()


def _load(subject: Subject, dtype: torch.dtype, device: torch.device) -> Any:
    if subject.loader is not None:
        return subject.loader(dtype, device)
    return load_parts(
        subject.base,
        subject.adapter,
        class_name(subject),
        subject.config,
        dtype=dtype,
        device=str(device),
        trust_remote_code=subject.trust_remote_code,
    )


@contextmanager
def without_compiler() -> Iterator[None]:
    """Run what packed kernels would have compiled as it is: compiling takes longer than a few passes over a text."""
    set_stance = getattr(torch.compiler, "set_stance", None)
    with nullcontext() if set_stance is None else set_stance("force_eager"):
        yield


def class_name(subject: Subject) -> str:
    """Return the transformers class of a model: what its run's report says, else what its configuration says."""
    if (subject.base / REPORT_NAME).is_file():
        source = read_json(subject.base / REPORT_NAME, "").get("source")
        if isinstance(source, dict) and isinstance(source.get("class"), str):
            return source["class"]
    return loader(subject.config, subject.trust_remote_code).__name__


def missing_packages(subject: Subject) -> list[str]:
    """Return which of the packages that load this model are not installed."""
    fmt = format_of(subject.config)
    return [] if fmt is None else fmt.missing_packages()


def loaded_bytes(subject: Subject, dtype: torch.dtype) -> int:
    """Return from headers alone what a model takes in memory: packed weights as they are, with the largest of them
    once dequantized, all others in `dtype`, and the adapter."""
    total = largest = 0
    for name, tensor in Checkpoint.open(subject.base, quantized=True).tensors.items():
        packed = name.endswith(".qweight")
        if packed:
            largest = max(largest, 16 * tensor.numel)  # at two bits, 16 weights in a word
        floating = tensor.dtype.is_floating_point and not name.endswith(".scales")
        total += tensor.numel * (dtype.itemsize if floating else tensor.dtype.itemsize)
    if subject.adapter is not None:
        file = subject.adapter / f"{WEIGHTS_STEM}.safetensors"
        total += sum(prod(tensor.shape) * 4 for tensor in read_header(file).values())
    return total + largest * (2 + dtype.itemsize)


def batch_size_for(windows: Windows, vocabulary: int) -> int:
    """Return how many windows run at once, so that their logits take BATCH_BYTES, or one window's more."""
    tokens = min(BATCH_BYTES // (4 * vocabulary), LARGEST_BATCH_TOKENS)
    return max(1, min(len(windows), tokens // windows.length))


def logits_bytes(windows: Windows, vocabulary: int, batch_size: int) -> int:
    """Return what one model's logits take, with what becomes of them."""
    return LOGIT_COPIES * 4 * batch_size * windows.length * vocabulary
