"""What `qinit plan --device-kind h100 --processes N` says of models from 0.5B to 405B.

    python benchmarks/scale.py [--device-kind h100] [--sizes 0.5B,8B] [--json FILE]

The checkpoints are headers alone, written on the spot: shapes of Qwen2.5 and of Llama 3, and no weights. A run with
calibration reads 128 samples of 512 tokens, which are there; neither kind of run is polished. Fine-tuning is on one
device and 1 x 1024 tokens. The last table holds the plan of the 8B model against the measurement that its constants
come from.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import conclude

from qinit.files.tensors import write_header_only
from qinit.planner.forecast import Asked, Forecast, forecast
from qinit.planner.kinds import BLOCKS, PLACE, Kind, load_kind
from qinit.planner.make import make_plan
from qinit.recipe import make_recipe

PROCESSES = (1, 8)
RECIPE = {"bits": 2, "rank": 16, "group_size": 64, "polish": 0}
TEXT = {"calibration": "random", "calibration_samples": 128, "calibration_length": 512}
WITHOUT = {"calibration": "none"}
FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
# The class, its five sizes, the vocabulary and whether the head is the embedding.
SIZES: dict[str, tuple[str, tuple[int, ...], int, bool]] = {
    "0.5B": ("Qwen2", (896, 4864, 24, 14, 2), 151936, True),
    "1B": ("Llama", (2048, 8192, 16, 32, 8), 128256, True),
    "3B": ("Llama", (3072, 8192, 28, 24, 8), 128256, True),
    "8B": ("Llama", (4096, 14336, 32, 32, 8), 128256, False),
    "14B": ("Qwen2", (5120, 13824, 48, 40, 8), 152064, False),
    "32B": ("Qwen2", (5120, 27648, 64, 40, 8), 152064, False),
    "70B": ("Llama", (8192, 28672, 80, 64, 8), 128256, False),
    "405B": ("Llama", (16384, 53248, 126, 128, 8), 128256, False),
}


def make_headers(directory: Path, size: str) -> Path:
    """Write the configuration and the headers of a model in bfloat16."""
    import transformers

    kind, sizes, vocabulary, tied = SIZES[size]
    config = getattr(transformers, f"{kind}Config")(
        **dict(zip(FIELDS, sizes, strict=True)),
        **{"vocab_size": vocabulary, "tie_word_embeddings": tied, "max_position_embeddings": 8192},
        **{"bos_token_id": 1, "eos_token_id": 2, "architectures": [f"{kind}ForCausalLM"], "dtype": "bfloat16"},
    )
    config.save_pretrained(directory)
    with torch.device("meta"):
        parameters = getattr(transformers, f"{kind}ForCausalLM")(config).named_parameters()
    header: dict[str, Any] = {}
    end = 0
    for name, parameter in parameters:
        start, end = end, end + 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [start, end]}
    write_header_only(directory / "model.safetensors", header)
    return directory


def said(directory: Path, kind: Kind, processes: int, **options: Any) -> Forecast:
    recipe = make_recipe(model=str(directory), **RECIPE, **options)
    return forecast(make_plan(recipe, directory, directory.name, card=kind.card), kind, Asked(processes))


def row_of(directory: Path, kind: Kind) -> dict[str, Any]:
    """Plan a model without data and with, on one device and on more."""
    free, calibrated = ({count: said(directory, kind, count, **how) for count in PROCESSES} for how in (WITHOUT, TEXT))
    plan = free[1].plan
    tuning = {"checkpointing": free[1].tuning[True].total, "without": free[1].tuning[False].total}
    return {
        **{"model": directory.name, "weights": plan.checkpoint.parameters, "source": plan.bytes_before},
        **{"written": plan.base_bytes + plan.adapter_bytes, "tuning": tuning},
        "without_data": {str(count): one.seconds.total for count, one in free.items()},
        "calibrated": {str(count): one.seconds.total for count, one in calibrated.items()},
        "working": {str(count): one.working_bytes for count, one in calibrated.items()},
    }


def against(directory: Path, kind: Kind, measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Hold a plan of the 8B model against what was measured of it; the check at the end was no part of that."""
    blocks, peak = "32 blocks", "peak, GB"
    free, calibrated = (said(directory, kind, 1, **how, check=False) for how in (WITHOUT, TEXT))
    text = said(directory, kind, 1, **{**TEXT, "calibration": "self"}, check=False).seconds.text
    solved = 32 / BLOCKS * measured["calibrated"]["split"]["solving"]
    found = [
        ("layers solved without data", "s", free.seconds.solving, measured["layers"][blocks]),
        ("a run without data", "s", free.seconds.total, measured["without data"][blocks]),
        ("layers solved with calibration", "s", calibrated.seconds.solving, solved),
        ("a run with calibration", "s", calibrated.seconds.total, measured["calibrated"][blocks]),
        ("text that the model writes", "s", text, measured["own text"][blocks]),
        ("memory of a run without data", "GB", free.working_bytes / 1e9, measured["without data"][peak]),
        ("memory of a run with calibration", "GB", calibrated.working_bytes / 1e9, measured["calibrated"][peak]),
    ]
    return [{"what": what, "unit": unit, "said": said, "measured": real} for what, unit, said, real in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device-kind", default="h100")
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    options = parser.parse_args()
    kind, rows = load_kind(options.device_kind), []
    measured = json.loads((PLACE / f"{options.device_kind}.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as place:
        for size in options.sizes.split(","):
            rows.append(row_of(make_headers(Path(place) / size, size), kind))
            print(json.dumps(rows[-1]), flush=True)
        beside = against(make_headers(Path(place) / "8B", "8B"), kind, measured)
    result = {"card": kind.card.name, "processes": [str(count) for count in PROCESSES], "rows": rows, "against": beside}
    conclude("scale", result, options.json)


if __name__ == "__main__":
    main()
