"""Calibration text that the model writes itself: no data, and the distribution that the model has learned.

As in LLM-QAT (arXiv:2305.17888, section 3.1), but sampled from the first token on, at temperature 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qinit.errors import CalibrationError
from qinit.machine import total_memory
from qinit.processes.group import ALONE, Processes
from qinit.source.checkpoint import read_json
from qinit.source.quiet import no_progress_bar
from qinit.source.skeleton import loader
from qinit.text.samples import Portion

# Bytes for the key-value caches and the logits of one batch, and texts in it at most: a GPU takes as long for a few as
# for many, on CPUs processes can share a usual text.
MEMORY = {"cpu": 4 * 2**30, "cuda": 12 * 2**30}
LARGEST_BATCH = {"cpu": 32, "cuda": 256}
SEED_STEP = 1_000_003  # between the seeds of two batches; on the CPU torch looks at their last 32 bits alone
FLOAT32_SHARE = 0.3  # of the machine's memory that the model may take in float32


def write_text(
    directory: Path,
    start: int,
    *,
    samples: int,
    length: int,
    seed: int,
    device: torch.device,
    memory: int | None = None,
    trust_remote_code: bool = False,
    processes: Processes = ALONE,
    portion: Portion = int,
) -> torch.Tensor:
    """Return int64 ids [samples, length] on the CPU: `start`, then tokens sampled from the model's own distribution.

    On a CPU the model runs in float32, as few have instructions for 16 bits; where it would take more than
    FLOAT32_SHARE of the machine's memory, and on a GPU, in the dtype that it is stored in. eos is a token like any
    other: text goes on behind it.
    `memory` (bytes; MEMORY if left out) bounds the batch, and `portion` is of what goes at once; the text depends on
    them, and on nothing that a machine happens to have free. Each batch is seeded with its place, so that `processes`
    can share them; each is given all of them. The random state of the caller stays as it is.
    Raises CalibrationError when the model cannot be loaded or run.
    """
    batches: dict[int, torch.Tensor] = {}
    most = -(-samples // LARGEST_BATCH[device.type])
    writing = min(processes.count, most)  # of the processes: no more of them hold the model
    if processes.rank < writing:
        model = _load(directory, device, trust_remote_code)
        fitting = batch_size(model.config.get_text_config(), length, model.dtype.itemsize, device, memory)
        size = portion(min(samples, fitting))
        for done in range(processes.rank * size, samples, writing * size):
            own = (seed + done // size * SEED_STEP) % 2**63
            with _explained(directory, model), _seeded(own, device):
                batches[done] = _sample(model, start, min(size, samples - done), length).cpu()
    everyone = processes.gather(batches, "the text that the model writes")
    written = {done: batch for share in everyone for done, batch in share.items()}
    return torch.cat([written[done] for done in sorted(written)])


@contextmanager
def _explained(directory: Path, model: Any) -> Iterator[None]:
    """Turn NaN in what a model predicts into a CalibrationError."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise CalibrationError(
            f"{directory}: the model predicts NaN or Inf in {model.dtype}, so that it cannot write its own text; "
            "its weights are damaged or do not fit that type"
        ) from None


def batch_size(config: Any, length: int, itemsize: int, device: torch.device, memory: int | None = None) -> int:
    """Return how many texts of `length` tokens fit into `memory` bytes of the device, from 1 to LARGEST_BATCH.

    Counts the key-value cache in `itemsize` bytes per value and four float32 copies of a step's logits.
    """
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", None) or 0) // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    layers = getattr(config, "num_hidden_layers", None) or 1
    per_text = 2 * layers * kv_heads * width * length * itemsize + 4 * 4 * config.vocab_size
    return max(1, min(LARGEST_BATCH[device.type], (MEMORY[device.type] if memory is None else memory) // per_text))


@torch.inference_mode()
def _sample(model: Any, start: int, count: int, length: int) -> torch.Tensor:
    first = torch.full((count, 1), start, dtype=torch.int64, device=model.device)
    if length == 1:
        return first
    return model.generate(input_ids=first, attention_mask=torch.ones_like(first), max_new_tokens=length - 1)


def _load(directory: Path, device: torch.device, trust_remote_code: bool) -> Any:
    import transformers

    config = read_json(directory / "config.json", "a model directory has one")
    try:
        with no_progress_bar():
            model, info = loader(config, trust_remote_code).from_pretrained(
                directory,
                dtype=_dtype(directory, device),
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:  # a checkpoint can break its class in any way
        reason = " ".join(str(error).split())[:300]
        raise CalibrationError(
            f"{directory}: the model cannot be loaded to write its own text ({type(error).__name__}: {reason}); "
            "calibrate on a text file or on `random`"
        ) from None
    missing = sorted(info["missing_keys"])
    if missing:  # they would be random, and so would be the text
        raise CalibrationError(
            f"{directory}: lacks {len(missing)} weights of {type(model).__name__} ({', '.join(missing[:3])}), so that "
            "it cannot write its own text; calibrate on a text file or on `random`"
        )
    # Replaced as a whole: generate() fills what it is not told from here, e.g. a repetition penalty or eos.
    model.generation_config = transformers.GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    return model.eval().to(device)


def model_bytes(stored: int, device: torch.device) -> int:
    """Return what a model of `stored` bytes takes in memory while it writes: twice as much where it runs in float32."""
    return 2 * stored if device.type == "cpu" and 2 * stored <= FLOAT32_SHARE * total_memory(device) else stored


def _dtype(directory: Path, device: torch.device) -> Any:
    stored = sum(file.stat().st_size for file in directory.glob("*.safetensors"))  # in 16 bits, mostly
    return torch.float32 if model_bytes(stored, device) > stored else "auto"


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators of the CPU and of `device`, and put them back afterwards; other devices' are not touched."""
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
