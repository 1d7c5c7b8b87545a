"""What a family of models is here: its configuration, made tiny, and the classes that are tried with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SMALL = {"vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LAYERS = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GATED = {**SMALL, **LAYERS, "num_key_value_heads": 2}
ENDINGS = {
    "language model": ("ForCausalLM", "LMHeadModel"),
    "masked": ("ForMaskedLM",),
    "none": ("Model",),
    "sequence": ("ForSequenceClassification",),
    "token": ("ForTokenClassification",),
    "generation": ("ForConditionalGeneration",),
    "image": ("ForImageClassification",),
}
DECODER = ("language model", "none", "sequence", "token")
ENCODER = ("masked", "none", "sequence", "token")
LABELS = 32  # of a classifier, wide enough for every format: only what the loaders do may keep a head from being packed


@dataclass(frozen=True)
class Family:
    """A family by its name for people; `config` and `stem` are what the library's classes start with: the model classes
    are `stem` and one of ENDINGS, for each of `heads` that the library has.

    `reads` says what its forward takes: tokens (`text`), images (`image`), sound (`audio`), or tokens and images
    (`both`). `nested`: a configuration of parts, whose labels and ids are its own affair.
    """

    name: str
    stem: str
    values: dict[str, Any]
    heads: tuple[str, ...] = DECODER
    config: str = ""
    reads: str = "text"
    kind: str = "decoder"
    classes: dict[str, str] = field(default_factory=dict)  # heads whose class has another name

    def class_of(self, head: str) -> str | None:
        """Return the name of the library's class with this head, None if it has none."""
        import transformers

        names = [self.classes[head]] if head in self.classes else [self.stem + ending for ending in ENDINGS[head]]
        return next((name for name in names if hasattr(transformers, name)), None)

    def make(self, head: str, directory: Path) -> Path:
        """Save a tiny random model with this head, float32, every vector in it random too."""
        import torch
        import transformers

        name = self.class_of(head)
        assert name is not None, f"{self.name} has no head '{head}'"
        values = {**self.values, "num_labels": LABELS} if head in ("sequence", "token", "image") else self.values
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(transformers, name)(getattr(transformers, self.config or f"{self.stem}Config")(**values))
            for parameter in model.parameters():
                if parameter.dim() == 1 and parameter.numel() > 1:
                    parameter.data += 0.02 * torch.randn_like(parameter)
        model.float().save_pretrained(directory)
        return directory
