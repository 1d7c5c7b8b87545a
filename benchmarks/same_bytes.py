"""Whether a change leaves every run as it was, byte for byte: the same runs by two revisions, one table.

    python benchmarks/same_bytes.py REV [OTHER]

REV and OTHER are revisions of git; OTHER left out is the working tree. Both write the same runs of tiny models, side by
side on this machine, one thread each. Compared are the SHA-256 of every tensor of base and adapter, and all other
files but for times, memory and paths; the exit code is 1 if anything differs. It takes some two minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "model_zoo" / "demo"
PACKAGES = {"qinit": "qinit", "qinit_cli": "cli", "qinit_demo": "model_zoo/demo"}
# One thread; and nothing is fetched, compiled or said meanwhile.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
KILLED_AFTER = 9  # finished tensors
# What a run tells of its circumstances; PATHS stand for where it was written.
VOLATILE = re.compile(r'"(seconds|peak_memory_bytes)": [\d.e+-]+')
SUMS = "SHA256SUMS"  # of the above, too

SMALL = {"vocab_size": 4096, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {
    **SMALL,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", LLAMA),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {**SMALL, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    ),
    "bert": (
        "BertConfig",
        "BertModel",
        {**SMALL, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {**SMALL, "d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 4, "d_kv": 16, "decoder_start_token_id": 0},
    ),
}


@dataclass(frozen=True)
class Case:
    """A run: the model it is of and its recipe; `killed` once on its way, and then gone on with."""

    model: str
    recipe: dict[str, Any]
    killed: bool = False


def cases() -> dict[str, Case]:
    """Return all runs by name."""
    short = {"rank": 4, "calibration_samples": 8, "calibration_length": 32}
    own = {**short, "calibration": "self"}
    drawn = {**short, "calibration": "random"}
    free = {"rank": 4, "calibration": "none"}
    polished = {  # so far off, and of a model that has learned something, that a polish gains and is kept
        **{"rank": 4, "calibration": "../text.txt", "calibration_samples": 16, "calibration_length": 64},
        **{"calibration_mode": "parallel", "rounding": "nearest", "polish": 10},
    }
    found = {
        "2 bits": Case("llama", {**free, "bits": 2}),
        "3 bits, dense": Case("llama", {**free, "bits": 3, "format": "dense"}),
        "8 bits, groups of 32": Case("llama", {**free, "bits": 8, "group_size": 32}),
        "2 bits, own text": Case("llama", {**own, "bits": 2}),
        "4 bits, own text, parallel": Case("llama", {**own, "bits": 4, "calibration_mode": "parallel"}),
        "3 bits, a file, dense, five rounds": Case(
            "llama", {**short, "bits": 3, "calibration": "../text.txt", "format": "dense", "iter": 5}
        ),
        "3 bits, act-order": Case("llama", {**own, "bits": 3, "act_order": True}),
        "2 bits, nearest": Case("llama", {**drawn, "bits": 2, "rounding": "nearest"}),
        "2 bits, polish": Case("demo", polished),
        "2 bits, polish, killed": Case("demo", polished, killed=True),
        "2 and 3 bits": Case("llama", {**own, "ratio": 0.5}),
        "2 and 3 bits, killed": Case("llama", {**own, "ratio": 0.5}, killed=True),
        "2 to 8 bits, packed, tied": Case("llama", {**free, "target_bits": 3.2, "format": "gptq", "tie": "fused"}),
        "2 and 3 bits, ranks too": Case("llama", {**drawn, "ratio": 0.5, "rank_budget": "60KB"}),
        "2 and 3 bits, by a rule": Case("llama", {**free, "ratio": 0.3, "allocation": "random"}),
        "GPT-2": Case("gpt2", {**own, "bits": 2, "use_rslora": True, "lora_alpha": 8.0, "format": "dense"}),
        "BERT": Case("bert", {**drawn, "bits": 2, "format": "dense"}),
        "T5": Case("t5", {**drawn, "bits": 2, "format": "dense"}),
    }
    for method in ("qlora", "loftq", "qpissa"):
        found[method] = Case("llama", {"method": method, "rank": 4, "bits": 2, "format": "dense"})
    for method in ("lqer", "qera", "eora", "cloq", "srr"):
        found[method] = Case("llama", {**drawn, "method": method, "bits": 3})
    found["lq-lora"] = Case("llama", {**drawn, "method": "lq-lora", "bits": 3, "format": "dense"})
    return found


def make_models(place: Path) -> None:
    """Save the models, with the demo model's tokenizer, and a text."""
    import torch
    import transformers

    for name, (config_class, model_class, values) in MODELS.items():
        torch.manual_seed(0)
        config = getattr(transformers, config_class)(**values)
        model = getattr(transformers, model_class)(config).to(torch.bfloat16)
        model.save_pretrained(place / name)
        for file in DEMO.glob("tokenizer*.json"):
            shutil.copy(file, place / name)
    (place / "demo").mkdir()
    for file in (*DEMO.glob("*.json"), *DEMO.glob("*.safetensors")):
        shutil.copy(file, place / "demo")
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    (place / "text.txt").write_text(text[:200_000], encoding="utf-8")


def write(name: str, case: Case, kill: bool) -> None:
    """Carry out one run in the current directory, by whatever `qinit` is imported; with `kill` up to a point."""
    import qinit

    recipe = qinit.make_recipe(model=case.model, device="cpu", check=False, **case.recipe)
    plan = qinit.make_plan(recipe, Path("..") / case.model, case.model)
    done = 0
    for event in qinit.run(plan, Path(directory_of(name))):
        done += type(event).__name__ == "Done"
        if kill and done == KILLED_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)


def directory_of(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def write_all(only: list[str]) -> None:
    for name, case in cases().items():
        if only and name not in only:
            continue
        if case.killed:
            command = [sys.executable, __file__, "--write", "--kill", "--only", name]
            ended = subprocess.run(command, check=False).returncode
            if ended != -signal.SIGKILL:
                raise SystemExit(f"{name}: ended with {ended} before it was killed")
        write(name, case, kill=False)


@contextmanager
def packages(revision: str | None, place: Path) -> Iterator[Path]:
    """Yield a directory from which the packages of a revision (None: the working tree) are imported."""
    tree, names = ROOT, place / "packages"
    names.mkdir(parents=True)
    if revision is not None:
        tree = place / "tree"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), revision], cwd=ROOT, check=True)
    try:
        for name, folder in PACKAGES.items():
            (names / name).symlink_to(tree / folder, target_is_directory=True)
        yield names
    finally:
        if revision is not None:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=False)


def tensors_of(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of every tensor of a run, base and adapter, with its dtype and shape."""
    import torch
    from safetensors import safe_open

    found = {}
    for file in sorted(directory.rglob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - no mapping
                tensor = handle.get_tensor(name).contiguous()
                raw = tensor.flatten().view(torch.uint8).numpy().tobytes()
                what = f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"
                found[f"{file.relative_to(directory)}: {name}"] = what
    return found


def others_of(directory: Path, place: Path) -> dict[str, str]:
    """Return the text of every other file of a run, without times, memory and the place that it was written to."""
    files = (file for file in directory.rglob("*") if file.is_file() and file.suffix != ".safetensors")
    texts = {file.relative_to(directory).as_posix(): file.read_text(encoding="utf-8") for file in files}
    return {
        name: VOLATILE.sub(r"\1", text.replace(str(place.resolve()), "PLACE"))
        for name, text in texts.items()
        if name != SUMS
    }


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def compare(ours: Path, theirs: Path, names: list[str]) -> tuple[list[list[str]], bool]:
    """Return a row for each run, and whether all are the same."""
    rows, same = [], True
    for name in names:
        one, other = ours / directory_of(name), theirs / directory_of(name)
        tensors = tensors_of(one), tensors_of(other)
        texts = others_of(one, ours), others_of(other, theirs)
        if not tensors[0] or not texts[0]:
            raise SystemExit(f"{name}: wrote nothing")
        changed, files = differing(*tensors), differing(*texts)
        same = same and not changed and not files
        total = hashlib.sha256(json.dumps(tensors[1], sort_keys=True).encode()).hexdigest()[:12]
        words = ", ".join(files) or "none"
        rows.append([name, str(len(tensors[1])), str(len(changed)), str(len(texts[1])), words, total])
        for what in changed[:3]:
            print(f"{name}: {what}", file=sys.stderr)
    return rows, same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("revisions", nargs="*", metavar="REV")
    parser.add_argument("--only", action="append", default=[], help="one run of them; may be given several times")
    parser.add_argument("--keep", type=Path, help="a new directory that the runs are left in")
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--kill", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        if options.kill:
            write(options.only[0], cases()[options.only[0]], kill=True)
        else:
            write_all(options.only)
        return
    if not 1 <= len(options.revisions) <= 2:
        parser.error("give one revision to compare the working tree with, or two")
    names = options.only or list(cases())
    revisions = [options.revisions[0], *(options.revisions[1:] or [None])]
    place = options.keep or Path(tempfile.mkdtemp(prefix="same-bytes-"))
    place.mkdir(exist_ok=True)
    try:
        make_models(place)
        with packages(revisions[0], place / "first") as one, packages(revisions[1], place / "second") as other:
            outs = []
            children = []
            for source, out in ((one, place / "one"), (other, place / "other")):
                out.mkdir()
                outs.append(out)
                command = [sys.executable, __file__, "--write", *(word for name in names for word in ("--only", name))]
                environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(source)}
                with out.with_suffix(".log").open("w") as log:
                    children.append(subprocess.Popen(command, cwd=out, env=environment, stdout=log, stderr=log))
            for child, out in zip(children, outs, strict=True):
                if child.wait():
                    raise SystemExit(f"a run failed:\n{out.with_suffix('.log').read_text(encoding='utf-8')}")
        rows, same = compare(outs[0], outs[1], names)
    finally:
        if options.keep is None:
            shutil.rmtree(place, ignore_errors=True)
    from common import show  # late: it imports torch

    words = [revision or "the working tree" for revision in revisions]
    header = ["run", "tensors", "that differ", "other files", "that differ", "SHA-256 of all tensors"]
    show(f"{words[0]} against {words[1]}: {'all the same' if same else 'NOT THE SAME'}", header, rows)
    sys.exit(not same)


if __name__ == "__main__":
    main()
