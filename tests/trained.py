"""What a trainer leaves: an adapter that was trained from a run's start, with its state beside it."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.stock import load


def train(run: Path, to: Path, steps: int = 2) -> Path:
    """Train a run's adapter for some steps and save it as PEFT does, among what a trainer saves too."""
    model = load(run)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    tokens = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(to)
    for name in ("optimizer.pt", "training_args.bin", "trainer_state.json", ".env", "checkpoint-2/adapter_config.json"):
        (to / name).parent.mkdir(exist_ok=True)
        (to / name).write_text("secret")
    return to
