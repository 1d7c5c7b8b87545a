"""How long a user waits: for `--help` of each command, and for the plan of a 70B-shaped checkpoint after the imports.

The checkpoint is made on the spot in a temporary directory, headers only. Each figure is the median of fresh processes
after one that warms the file cache; CPU seconds stand beside it, which are what an idle machine would take.

    python benchmarks/startup.py [--runs 5] [--json FILE]

Exits with 1 if a help takes more than 0.4 s or the plan more than 10 s.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

HELP_LIMIT, PLAN_LIMIT = 0.4, 10.0
CONFIG: dict[str, Any] = {  # Llama 3's 70B
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
}
SHARDS = 30
# What `qinit plan` does, in its own order, with its imports in front.
CHILD = """
import json, sys, time
from contextlib import redirect_stdout
from io import StringIO
started = time.perf_counter()
from qinit_cli import main
from qinit_cli.hush import hush
hush()
import accelerate, qinit.planner.time, qinit.widths.budget, qinit.hub.download
import qinit.grids.integer.search_cpu, qinit.grids.integer.rounding_cpu
from transformers import LlamaForCausalLM
imported, cpu = time.perf_counter(), time.process_time()
sys.argv = ["qinit", "plan", *sys.argv[1:], "--json"]
with redirect_stdout(StringIO()) as out:
    try:
        main.main()
    except SystemExit as stop:
        assert not stop.code, stop.code
done, used = time.perf_counter(), time.process_time() - cpu
plan = json.loads(out.getvalue())
seconds = {"imports": [imported - started, cpu], "plan": [done - imported, used]}
print(json.dumps({**seconds, "layers": len(plan["layers"])}))
"""


def make_checkpoint(directory: Path) -> None:
    """Write config.json, the index and the headers of a 70B model in shards; no weights."""
    from qinit.files.tensors import write_header_only

    hidden, inner, vocabulary = (CONFIG[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    kv = hidden // CONFIG["num_attention_heads"] * CONFIG["num_key_value_heads"]
    block = {
        **{f"self_attn.{name}_proj": (hidden, hidden) for name in ("q", "o")},
        **{f"self_attn.{name}_proj": (kv, hidden) for name in ("k", "v")},
        **{f"mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")},
        "mlp.down_proj": (hidden, inner),
        **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (hidden,)),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(CONFIG["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    directory.joinpath("config.json").write_text(json.dumps(CONFIG))
    weight_map: dict[str, str] = {}
    names = list(shapes)
    for shard in range(SHARDS):
        file, header, end = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors", {}, 0
        for name in names[shard * len(names) // SHARDS : (shard + 1) * len(names) // SHARDS]:
            size = 2
            for length in shapes[name]:
                size *= length
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [end, end + size]}
            end += size
            weight_map[name] = file
        write_header_only(directory / file, header)
    index = {"metadata": {}, "weight_map": weight_map}
    directory.joinpath("model.safetensors.index.json").write_text(json.dumps(index))


def seconds_of(command: list[str], runs: int) -> list[list[float]]:
    """Run a command in fresh processes, once more than is counted; returns wall and CPU seconds of each run."""
    found = []
    for _ in range(runs + 1):
        started, before = time.perf_counter(), os.times()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wall, after = time.perf_counter() - started, os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        found.append([wall, cpu])
    return found[1:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the rows there too")
    arguments = parser.parse_args()
    from qinit_cli.main import app

    rows: list[dict[str, Any]] = []

    def row(what: str, seconds: list[list[float]], limit: float | None) -> None:
        wall, cpu = (median(values) for values in zip(*seconds, strict=True))
        verdict = "" if limit is None else f"at most {limit:g}: {'ok' if wall <= limit else 'over'}"
        print(f"{what:<40} {wall:6.2f} s  {cpu:6.2f} s of CPU  {verdict}".rstrip(), flush=True)
        rows.append({"what": what, "wall": round(wall, 3), "cpu": round(cpu, 3), "limit": limit})

    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, medians of {arguments.runs} runs")
    qinit = str(Path(sys.executable).with_name("qinit"))
    row("python -c pass", seconds_of([sys.executable, "-c", "pass"], arguments.runs), None)
    commands = [command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands]
    for command in ("", *commands):
        words = [qinit, *filter(None, [command]), "--help"]
        row(" ".join(["qinit", *words[1:]]), seconds_of(words, arguments.runs), HELP_LIMIT)
    with tempfile.TemporaryDirectory(prefix="qinit-startup-") as place:
        model = Path(place) / "70B"
        model.mkdir()
        make_checkpoint(model)
        for options in ([], ["--ratio", "0.5"]):
            found = []
            for _ in range(arguments.runs + 1):
                child = subprocess.run(
                    [sys.executable, "-c", CHILD, str(model), *options],
                    check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=place,
                )  # fmt: skip
                found.append(json.loads(child.stdout))
            words = " ".join(["qinit plan 70B", *options])
            row(f"{words}: imports", [each["imports"] for each in found[1:]], None)
            row(f"{words}: {found[0]['layers']} layers", [each["plan"] for each in found[1:]], PLAN_LIMIT)
    if arguments.json:
        arguments.json.write_text(json.dumps({"runs": arguments.runs, "rows": rows}, indent=2) + "\n")
    return int(any(each["limit"] is not None and each["wall"] > each["limit"] for each in rows))


if __name__ == "__main__":
    sys.exit(main())
