"""Text to token ids with the checkpoint's own tokenizer: windows of a stream, or padded documents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qinit.errors import CalibrationError
from qinit.source.skeleton import own_code
from qinit.source.vocabulary import Facts

LARGEST_TOKENIZER = 256 << 20  # bytes of one of its files; the largest in use have some 40 MB
TOKENIZER_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
_FATAL = (KeyboardInterrupt, SystemExit, GeneratorExit)
PIECE = 2**16  # characters that are tokenized in one go: some tokenizers slow down on long texts


def characters_for(samples: int, length: int) -> int:
    """Return how many characters of text are enough to draw from: about four times the tokens that are wanted."""
    return max(16 * samples * length, 2**20)


def load_tokenizer(
    directory: Path,
    trust_remote_code: bool = False,
    instead: str = "calibrating on text needs it (`self` and `random` do without)",
) -> Any:
    """Load a checkpoint's tokenizer; raises CalibrationError, with what to do `instead`, when it has none, or one that
    is code, untrusted."""
    import transformers

    for file in directory.iterdir():
        if file.suffix in TOKENIZER_SUFFIXES and file.is_file() and file.stat().st_size > LARGEST_TOKENIZER:
            raise CalibrationError(
                f"{file}: has {file.stat().st_size / 1e6:.1f} MB, at most {LARGEST_TOKENIZER / 1e6:.1f} MB are read of "
                f"a tokenizer; {instead}"
            )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust_remote_code
        )
        known = len(tokenizer) - len(tokenizer.all_special_ids)  # without files, some classes come up empty
    except _FATAL:
        raise
    except BaseException as error:  # files of any kind and age; a panic in Rust is no Exception
        refused = own_code(directory / "tokenizer_config.json", error)
        if refused is not None:
            raise CalibrationError(f"{refused}; {instead}") from None
        raise CalibrationError(
            f"{directory}: no tokenizer that transformers can load ({_reason(error)}); {instead}"
        ) from None
    if known <= 0:
        raise CalibrationError(f"{directory}: has no tokenizer files; {instead}")
    return tokenizer


def draw_windows(
    tokenizer: Any, text: str, where: str, facts: Facts, *, samples: int, length: int, seed: int
) -> torch.Tensor:
    """Return int64 ids [n, length]: non-overlapping windows of `text`, drawn without replacement, in text order.

    n is `samples`, or the number of whole windows if that is smaller. A text shorter than one window gives one
    sample, as long as it is. Where the tokenizer starts a text with bos, each sample starts with it.
    Raises CalibrationError, naming `where`, for text without tokens and for ids that the model does not have.
    """
    generator = torch.Generator().manual_seed(seed)
    pieces = list(_pieces(text))
    wanted = -(-characters_for(samples, length) // PIECE)
    pieces = [pieces[i] for i in _draw(len(pieces), wanted, generator)]
    with _tokenizing(where):
        encoded = tokenizer(pieces, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
        bos = _added_bos(tokenizer)
    stream = torch.tensor([i for ids in encoded for i in ids], dtype=torch.int64)
    if not len(stream):
        raise CalibrationError(f"{where}: the model's tokenizer makes no tokens of this text; give another text")
    body = length - len(bos)
    count = len(stream) // body
    windows = stream[: count * body].view(count, body) if count else stream[None]
    windows = windows[_draw(len(windows), samples, generator)]
    tokens = torch.cat([torch.tensor(bos, dtype=torch.int64).expand(len(windows), -1), windows], dim=1)
    require_known(max(int(stream.max()), *bos) if bos else int(stream.max()), where, facts)
    return tokens


def draw_documents(
    tokenizer: Any, documents: list[str], where: str, facts: Facts, *, samples: int, length: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return int64 ids [n, longest] and the mask [n, longest] (None: no padding) of documents drawn without
    replacement, each encoded on its own with its special tokens and cut to `length` tokens.

    Raises CalibrationError, naming `where`, for text without tokens and for ids that the model does not have.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [documents[i] for i in _draw(len(documents), samples, generator)]
    with _tokenizing(where):
        length = min(length, tokenizer.model_max_length)  # RoBERTa has fewer usable positions than its config says
        encoded = tokenizer(drawn, truncation=True, max_length=length, return_special_tokens_mask=True, verbose=False)
    rows = [
        torch.tensor(ids, dtype=torch.int64)
        for ids, special in zip(encoded.input_ids, encoded.special_tokens_mask, strict=True)
        if not all(special)
    ]
    if not rows:
        raise CalibrationError(
            f"{where}: the model's tokenizer makes no tokens of this text, within {length} and besides its special "
            "ones; give another text or a longer length"
        )
    require_known(max(int(row.max()) for row in rows), where, facts)
    pad = next((i for i in (facts.pad, tokenizer.pad_token_id) if i is not None), 0)  # what is masked is not read
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    return tokens, None if bool(mask.all()) else mask


@contextmanager
def _tokenizing(where: str) -> Iterator[None]:
    """Turn whatever a damaged tokenizer raises on a text into a CalibrationError."""
    try:
        yield
    except _FATAL:
        raise
    except BaseException as error:  # as above
        raise CalibrationError(f"{where}: the model's tokenizer fails on this text ({_reason(error)})") from None


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _draw(count: int, wanted: int, generator: torch.Generator) -> list[int]:
    """Return `wanted` of range(count), or all, in ascending order."""
    if count <= wanted:
        return list(range(count))
    return torch.randperm(count, generator=generator)[:wanted].sort().values.tolist()


def _pieces(text: str) -> Iterator[str]:
    """Cut a text into pieces of at most PIECE characters, at line ends where there are any."""
    start = 0
    while start < len(text):
        end = start + PIECE
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _added_bos(tokenizer: Any) -> list[int]:
    """Return [bos] if the tokenizer starts a text with it, else []."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer("a").input_ids[:1]) == [bos] else []


def require_readable(tokenizer: Any, text: str, facts: Facts) -> None:
    """Raise CalibrationError for a tokenizer that fails on a text, or makes ids of it that the model does not have."""
    where = str(facts.config_file.parent)
    with _tokenizing(where):
        ids = tokenizer(text, verbose=False).input_ids
    require_known(max(ids, default=0), where, facts)


def require_known(largest: int, where: str, facts: Facts) -> None:
    """Raise CalibrationError, naming `where`, for a token id that the model does not have."""
    if facts.vocabulary is not None and largest >= facts.vocabulary:
        raise CalibrationError(
            f"{where}: the tokenizer made token id {largest}, but the model has ids up to {facts.vocabulary - 1} "
            f"({facts.config_file}: vocab_size {facts.vocabulary}); the tokenizer is that of another model"
        )
