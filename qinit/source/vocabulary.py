"""What a checkpoint's configuration says about the token ids that its model reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qinit.errors import CalibrationError
from qinit.source.checkpoint import read_json

LARGEST_VOCABULARY = 2**24  # the largest in use have about 10^6 tokens
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")  # MPT has the last alone
CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True)
class Facts:
    """`vocabulary` is the number of ids, `positions` the longest input in tokens (None: not said, or no limit).

    `causal`: the model predicts the next token, so that it reads windows of a stream and can write text itself.
    `start` is the id in front of a text: bos, else eos. `end` is the one behind a text that an encoder reads for a
    decoder (None: there is no such pair, or no eos): sequence heads look for it. `special` holds the ids of bos, eos,
    padding and whatever else the configuration names, e.g. what stands for an image.
    """

    config_file: Path
    architecture: str
    causal: bool
    vocabulary: int | None
    positions: int | None
    start: int | None
    end: int | None
    pad: int | None
    special: frozenset[int]

    @classmethod
    def read(cls, directory: Path, config: dict[str, Any], trust_remote_code: bool = False) -> Facts:
        """Take them from config.json, its text_config, generation_config.json (token ids only) and, for sizes that
        none of these spells out, the defaults of the model's configuration class."""
        generation_file = directory / "generation_config.json"
        generation = read_json(generation_file, "") if generation_file.is_file() else {}
        bos, eos, pad = (list(_ids(config, generation, key=f"{name}_token_id")) for name in ("bos", "eos", "pad"))
        architectures = config.get("architectures") or []
        return cls(
            config_file=directory / "config.json",
            architecture=", ".join(map(str, architectures)) or "no architecture",
            causal=_is_causal(architectures, config),
            vocabulary=_size(directory, config, trust_remote_code, "vocab_size"),
            positions=_size(directory, config, trust_remote_code, *POSITIONS),
            start=next(iter(bos + eos), None),
            end=next(iter(eos), None) if config.get("is_encoder_decoder") is True else None,
            pad=next(iter(pad), None),
            special=frozenset([*bos, *eos, *pad, *_named_ids(config)]),
        )

    def clip(self, length: int) -> int:
        """Return `length`, or the longest input that the model takes if that is shorter."""
        return length if self.positions is None else min(length, self.positions)

    @property
    def writes(self) -> bool:
        """Whether the model can write text: it predicts tokens, and has one to start from."""
        if not self.causal or self.start is None:
            return False
        return self.vocabulary is None or self.start < self.vocabulary

    def require_vocabulary(self) -> int:
        """Return the vocabulary's size; raises CalibrationError when nothing says it."""
        if self.vocabulary is None:
            raise CalibrationError(
                f"{self.config_file}: no vocab_size (nor one in text_config), so that no token ids can be drawn; "
                "calibrate on a text file, or give --calibration none for a model that reads no text"
            )
        if self.vocabulary > LARGEST_VOCABULARY:
            raise CalibrationError(
                f"{self.config_file}: vocab_size is {self.vocabulary}, at most {LARGEST_VOCABULARY} are drawn from; "
                "calibrate on a text file"
            )
        return self.vocabulary

    def require_start(self) -> int:
        """Return the id that a text starts with.

        Raises CalibrationError for a model that does not write text and for one without such an id.
        """
        instead = "calibrate on a text file or on `random` instead of `self`"
        if not self.causal:
            raise CalibrationError(
                f"{self.config_file}: `self` needs a causal language model (an architecture that ends in "
                f"{' or '.join(CAUSAL_ENDINGS)}), found {self.architecture}; {instead}"
            )
        if self.start is None:
            raise CalibrationError(
                f"{self.config_file}: `self` needs a token to start from, and neither it nor generation_config.json "
                f"has a bos_token_id or an eos_token_id; {instead}"
            )
        if not self.writes:
            raise CalibrationError(
                f"{self.config_file}: the token to start from has id {self.start}, but vocab_size is "
                f"{self.vocabulary}; correct bos_token_id, or {instead}"
            )
        return self.start


def _is_causal(architectures: list[Any], config: dict[str, Any]) -> bool:
    """No architecture: qinit loads it as a causal LM. ForConditionalGeneration with a text_config: a decoder that
    also sees or hears; without one it is an encoder-decoder such as T5."""
    names = [str(name) for name in architectures]
    beside = "text_config" in config and not config.get("is_encoder_decoder")
    sees = beside and any(name.endswith("ForConditionalGeneration") for name in names)
    return not names or sees or any(name.endswith(CAUSAL_ENDINGS) for name in names)


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, dict) else {}


def _ids(*places: dict[str, Any], key: str) -> Iterator[int]:
    """Yield the token ids under `key` in order of precedence; some models have a list of them."""
    config, generation = places
    for place in (config, _text_config(config), generation):
        value = place.get(key)
        yield from (
            i for i in (value if isinstance(value, list) else [value]) if type(i) is int and 0 <= i < LARGEST_VOCABULARY
        )


def _named_ids(config: dict[str, Any]) -> Iterator[int]:
    for place in (config, _text_config(config)):
        for key in place:
            if key.endswith(("_token_id", "_token_index")):
                yield from _ids(place, {}, key=key)


def _size(directory: Path, config: dict[str, Any], trust_remote_code: bool, *keys: str) -> int | None:
    for place in (_text_config(config), config):  # PaliGemma's own vocab_size counts less than its embedding has
        for key in keys:
            value = place.get(key)
            if type(value) is int and value > 0:
                return value
    import transformers

    try:
        known = transformers.AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust_remote_code
        )
        values = [getattr(known.get_text_config(), key, None) for key in keys]
    except Exception:  # a config can break its class in any way; whoever builds the model says so
        return None
    return next((value for value in values if type(value) is int and value > 0), None)
