"""GGUF: base and adapter as llama.cpp reads them, each a file. Codes stay codes, in the smallest type for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qinit.exports.base import Export
from qinit.exports.finished import FinishedRun
from qinit.exports.gguf.families import FAMILIES, Family, add_hyperparameters, cannot_compute
from qinit.exports.gguf.layout import (
    F32,
    Tensor,
    adapter_layout,
    base_layout,
    family_of,
    model_config,
    rope_tensor,
    without_place,
)
from qinit.exports.gguf.reading import RereadGguf
from qinit.exports.gguf.vocabulary import Vocabulary, read_vocabulary
from qinit.exports.lora import no_factors
from qinit.exports.reread import Reread
from qinit.report.report import Report
from qinit.requirements import pip_command

if TYPE_CHECKING:
    from gguf import GGUFWriter

BASE, ADAPTER = "model.gguf", "adapter.gguf"
QUANTIZATION_VERSION = 2  # of ggml's types: GGML_QNT_VERSION


class GgufExport(Export[list[Tensor]]):
    name = "gguf"
    reader = "llama.cpp"
    library = "gguf"
    tags = ("llama.cpp",)

    def cannot_hold(self, run: FinishedRun) -> str | None:
        if find_spec("gguf") is None:
            return f"needs gguf, llama.cpp's package; {pip_command(['gguf'])}"
        family = family_of(run)
        if family is None:
            return f"{run.architecture.class_name} is not written; {', '.join(FAMILIES)} are"
        config = model_config(run)
        if problem := cannot_compute(family, config):
            return f"{run.directory / 'config.json'}: {problem}"
        if (parameter := without_place(run, family)) is not None:
            return f"{run.directory}: '{parameter}' is not stored, or llama.cpp's {family.architecture} has none"
        vocabulary = read_vocabulary(run.directory, config.vocab_size)
        return f"{run.directory}: {vocabulary}" if isinstance(vocabulary, str) else no_factors(run)

    def load(self, report: Report) -> str:
        return f"With llama.cpp:\n\n```\nllama-server -m {BASE} --lora {ADAPTER}\n```\n"

    def reread(self, directory: Path, report: Report, *, trust_remote_code: bool) -> Reread:
        return RereadGguf(directory / BASE, directory / ADAPTER, str(report.source.get("class")))

    def layout(self, run: FinishedRun) -> list[Tensor]:
        family = family_of(run)
        assert family is not None
        return list(base_layout(run, family))

    def nbytes(self, run: FinishedRun, layout: list[Tensor]) -> int:
        return sum(tensor.nbytes for tensor in layout) + run.adapter_bytes

    def write(self, run: FinishedRun, layout: list[Tensor], directory: Path, out: Path) -> None:
        family = family_of(run)
        assert family is not None
        _write_base(run, family, layout, directory / BASE)
        if run.adapter.parts:
            _write_adapter(run, family, directory / ADAPTER)


def _write_base(run: FinishedRun, family: Family, tensors: list[Tensor], file: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(None, family.architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(run.report.model)
    writer.add_file_type(_file_type(tensor.type.file_type for tensor in tensors if tensor.module is not None))
    writer.add_quantization_version(QUANTIZATION_VERSION)
    config = model_config(run)
    add_hyperparameters(writer, config)
    vocabulary = read_vocabulary(run.directory, config.vocab_size)
    assert isinstance(vocabulary, Vocabulary)
    vocabulary.add_to(writer)
    extra = rope_tensor(run)
    if extra is not None:
        _announce(writer, extra[0], tuple(extra[1].shape), F32.number, extra[1].nbytes)
    for tensor in tensors:
        _announce(writer, tensor.name, tensor.shape, tensor.type.number, tensor.nbytes)
    values = (tensor.read(run) for tensor in tensors)
    _write(writer, file, values if extra is None else (each for part in ([extra[1]], values) for each in part))


def _write_adapter(run: FinishedRun, family: Family, file: Path) -> None:
    import gguf

    alpha = float(run.adapter.settings["lora_alpha"])
    writer = gguf.GGUFWriter(None, family.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(f"{run.report.model} {run.adapter_directory.name}")
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, value in adapter_layout(run, family, alpha):
        _announce(writer, name, tuple(value.shape), F32.number, value.nbytes)
    _write(writer, file, (value for _, value in adapter_layout(run, family, alpha)))


def _announce(writer: GGUFWriter, name: str, shape: tuple[int, ...], number: int, nbytes: int) -> None:
    """Tell a tensor's place. The type is given by its number: the package's list of names is older than Q2_0."""
    import numpy as np

    writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=number)  # type: ignore[arg-type]


def _write(writer: GGUFWriter, file: Path, values: Iterable[torch.Tensor]) -> None:
    """Write what has been announced; `values` are taken one at a time."""
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for value in values:
            writer.write_tensor_data(value.contiguous().numpy())
    finally:
        writer.close()


def _file_type(found: Iterable[int]) -> int:
    """Return the file type of most layers."""
    return Counter(found).most_common(1)[0][0]
