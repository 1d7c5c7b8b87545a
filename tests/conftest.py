"""Tiny random checkpoints, and a setting in which no test reaches the network.

Use `from tests.conftest import make_checkpoint`. torch and transformers are imported on first use only.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub_stand_in import StandInHub

# Read by huggingface_hub when it is imported; a test that talks to a local stand-in lifts it for itself.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# gptqmodel compiles each layer's dequantize; PyTorch's own switch saves a minute of compiler.
os.environ["TORCHDYNAMO_DISABLE"] = "1"
# Threads that wait for others sleep: spinning makes tiny matrices 100 times slower where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# The stand-in for the Hub keeps LFS objects; huggingface_hub would send to Xet whatever the server says.
os.environ["HF_HUB_DISABLE_XET"] = "1"
for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
    os.environ.pop(variable, None)

SMALL = {"vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GATED = {
    **SMALL,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
# family: configuration class, model class, configuration
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", GATED),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GATED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**GATED, "head_dim": 32}),
    "mistral": ("MistralConfig", "MistralForCausalLM", GATED),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**GATED, "head_dim": 32}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", GATED),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            **SMALL,
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        },
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {**SMALL, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}),
}


def make_checkpoint(
    directory: Path,
    family: str = "llama",
    dtype: str = "bfloat16",
    *,
    seed: int = 0,
    model_class: str | None = None,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Save a tiny random model of a family into `directory` and return it.

    `overrides` are configuration values; `model_class` saves another class than the causal LM, e.g. GPT2Model.
    """
    import torch
    import transformers

    config_class, causal_class, values = FAMILIES[family]
    config = getattr(transformers, config_class)(**{**values, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, model_class or causal_class)(config)
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


@pytest.fixture
def tiny_llama(tmp_path: Path) -> Path:
    """A Llama of 2 layers, width 64, bfloat16, one safetensors file."""
    return make_checkpoint(tmp_path / "tiny-llama")


def rewrite_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the parsed header of a safetensors file and write it back over the data, its length fixed."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    new = json.dumps(header).encode()
    file.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + length :])


def exhausted(events: Generator[Any, None, Any]) -> tuple[Any, list[Any]]:
    """Run a generator to its end; returns its result and what it yielded."""
    seen = []
    while True:
        try:
            seen.append(next(events))
        except StopIteration as stop:
            return stop.value, seen


def quantize(source: Path, out: Path, *, overwrite: bool = False, **options: Any) -> Any:
    """Run qinit on a checkpoint, rank 4, one round and no calibration unless told otherwise; returns the report."""
    from qinit.events import Finished
    from qinit.planner.make import make_plan
    from qinit.recipe import make_recipe
    from qinit.runner.run import run

    recipe = make_recipe(**{"model": str(source), "rank": 4, "iter": 1, "calibration": "none", **options})
    *_, last = run(make_plan(recipe, source, str(source)), out, overwrite=overwrite)
    assert isinstance(last, Finished)
    return last.report


def weights_of(directory: Path) -> dict[str, bytes]:
    """Return the bytes of every safetensors file below a directory."""
    return {str(file.relative_to(directory)): file.read_bytes() for file in sorted(directory.rglob("*.safetensors"))}


def contents(directory: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a directory."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense run of three shards with its SHA256SUMS, not to be changed."""
    from qinit.files.manifest import write_manifest

    place = tmp_path_factory.mktemp("finished")
    quantize(make_checkpoint(place / "source"), place / "run", format="dense", max_shard_size="100KB")
    write_manifest(place / "run")
    return place / "run"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    """A local stand-in for the Hub, which huggingface_hub talks to as if it were the real one."""
    from huggingface_hub import constants

    stand_in = StandInHub()
    monkeypatch.setattr(constants, "ENDPOINT", stand_in.endpoint)
    template = stand_in.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    yield stand_in
    stand_in.close()


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Shorten what huggingface_hub waits before it tries again (1, 2, 4, 8 and 8 s); returns what it would have."""
    waited, sleep = [], time.sleep

    def short(seconds: float) -> None:
        waited.append(seconds)
        sleep(min(seconds, 0.001))

    monkeypatch.setattr(time, "sleep", short)
    return waited


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs `qinit ARGUMENTS` in an empty directory: (exit code, stdout, stderr).

    Calibration `auto` is none there, and fast; `qinit.planner.make.choose` is what a test may put back.
    """
    from qinit_cli import main

    directory = tmp_path / "cwd"
    directory.mkdir()
    monkeypatch.chdir(directory)
    monkeypatch.setattr("qinit.planner.make.choose", lambda plan, device: ("none", ""))

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["qinit", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main.main()
        return (int(stop.value.code or 0), *capsys.readouterr())

    return call
