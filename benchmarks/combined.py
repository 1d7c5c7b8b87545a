"""Two adapters, trained from one 2-bit start on different texts, made one: as PEFT does, and with the start once.

    python benchmarks/combined.py [--steps 60] [--rate 0.004] [--json FILE]

The demo model at 2 bits, rank 16; one adapter is trained on the standard library's code, the other on books, with the
same steps and rate. The held-out loss of both texts, in nats per token, is that of the start, of each adapter, and of
every combination: PEFT's `add_weighted_adapter` on what the adapters hold, and `qinit merge --adapters`.
"""

from __future__ import annotations

import argparse
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from common import conclude, load_for_training, load_tokens, quantize

from qinit.evaluate.figures import figures_of
from qinit.merge.combinations import COMBINATIONS, PRUNING
from qinit.merge.combine import DENSITY, combine, plan_combine
from qinit.source.demo import DEMO_NAME, demo_directory, new_domain
from qinit.train.finetune import Training, finetune

WEIGHTS = ((0.5, 0.5), (0.7, 0.3), (1.0, 1.0))
WINDOW, WINDOWS = 256, 16
HELD_OUT = 0.1  # of the books


def texts() -> dict[str, tuple[str, str]]:
    """Return each text to train on and the one to measure on."""
    books = resources.files("qinit.text.bundled").joinpath("books.txt").read_text(encoding="utf-8")
    cut = int(len(books) * (1 - HELD_OUT))
    return {"code": new_domain(), "books": (books[:cut], books[cut:])}


def spread(tokens: torch.Tensor) -> torch.Tensor:
    """Return windows from all over a text."""
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    return windows[torch.linspace(0, len(windows) - 1, WINDOWS).long()].flatten()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=0.004)
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    demo = demo_directory()
    tokens = {name: tuple(load_tokens(demo, text) for text in pair) for name, pair in texts().items()}
    measured = {name: spread(test) for name, (_, test) in tokens.items()}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        run = place / "run"
        options: dict[str, Any] = {"calibration": "self", "calibration_samples": 64, "calibration_length": 256}
        quantize(demo, run, "eqft", bits=2, rank=16, polish=0, format="dense", **options)  # packed, PEFT has no svd
        adapters = []
        for name, (training, _) in tokens.items():
            model = load_for_training(run, torch.float32)
            finetune(model, training, Training(given.steps), rate=given.rate, seed=0)
            model.save_pretrained(place / name)
            adapters.append(place / name)
        rows = rows_of(run, adapters, measured, list(tokens))
    value = {"model": DEMO_NAME, "steps": given.steps, "rate": given.rate, "density": DENSITY, "texts": list(tokens)}
    conclude("combined", {**value, "rows": rows}, given.json, seeds=[0])


def rows_of(run: Path, adapters: list[Path], measured: dict[str, torch.Tensor], names: list[str]) -> list[Any]:
    """Measure the start, each adapter and every combination."""
    model = load_for_training(run, torch.float32).eval()

    def losses(adapter: str) -> dict[str, float]:
        model.set_adapter(adapter)
        return {name: figures_of(model, test, WINDOW).loss for name, test in measured.items()}

    rows: list[dict[str, Any]] = [{"what": "start", "losses": losses("default")}]
    for name, adapter in zip(names, adapters, strict=True):
        model.load_adapter(adapter, name)
        rows.append({"what": f"trained on {name}", "losses": losses(name)})
    for weights in WEIGHTS:
        for how in COMBINATIONS:
            density = DENSITY if how in PRUNING else None
            torch.manual_seed(0)
            model.base_model.add_weighted_adapter(names, list(weights), "naive", combination_type=how, density=density)
            found = {"naive": losses("naive")}
            out = run.parent / "out" / how / "-".join(map(str, weights))
            combine(plan_combine(adapters, weights, how, density), out)
            model.load_adapter(out, "ours")
            found["ours"] = losses("ours")
            model.set_adapter("default")
            for name in found:
                model.delete_adapter(name)
            rows.append({"what": how, "weights": list(weights), **found})
            print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
