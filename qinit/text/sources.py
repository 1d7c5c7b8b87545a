"""`--calibration SOURCE` to samples: a file, the model's own text, text that qinit brings, random tokens, or a data set
on the Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import torch

from qinit.errors import CalibrationError
from qinit.processes.group import ALONE, Processes
from qinit.recipe import BUNDLED, RANDOM, SELF
from qinit.source.vocabulary import Facts
from qinit.text.bundled import calibration_documents
from qinit.text.documents import is_jsonl, read_file, read_text
from qinit.text.hub_documents import HUB_SOURCE, parse_hub, read_hub, require_datasets
from qinit.text.passages import passages
from qinit.text.samples import Portion, Samples
from qinit.text.self_text import write_text
from qinit.text.tokens import characters_for, draw_documents, draw_windows, load_tokenizer, require_readable

SOURCES = (
    "SOURCE may be a text file, a JSONL file (.jsonl or .json, one object per line), `self` (text that the model "
    "writes), `text` (text that qinit brings), `random` (random tokens), or the id of a data set on the Hub "
    "(owner/name:config@split)"
)
CPU = torch.device("cpu")


def load_samples(
    source: str,
    directory: Path,
    config: dict[str, Any],
    *,
    samples: int,
    length: int,
    seed: int,
    text_field: str | None = None,
    token: str | None = None,
    device: torch.device = CPU,
    trust_remote_code: bool = False,
    processes: Processes = ALONE,
    portion: Portion = int,
) -> Samples:
    """Return up to `samples` samples of up to `length` tokens, on the CPU, for the model in `directory`.

    `length` is cut to what the model takes. Causal models get windows of the text as one stream, others each document
    (a plain text's paragraphs) on its own, padded; of the text that qinit brings, as many passages of all lengths as
    make `samples` x `length` tokens. `text_field` (default "text") names the text in JSONL and data
    sets, `token` opens private data sets, `device` runs the model for `self`, a `portion` at once. The same seed gives
    the same samples.
    Of several `processes` all write for `self`; what is read is read by the first, for all.
    Raises CalibrationError for a source that cannot be used, HubError for what the Hub answers.
    """
    if processes.several and source != SELF:
        return processes.from_first(
            lambda: load_samples(
                source,
                directory,
                config,
                samples=samples,
                length=length,
                seed=seed,
                text_field=text_field,
                token=token,
                trust_remote_code=trust_remote_code,
            ),
            "the text",
        )
    kind = kind_of(source)
    _check_field(source, kind, text_field)
    facts = Facts.read(directory, config, trust_remote_code)
    length = facts.clip(length)
    if samples < 1 or length < 2:
        raise CalibrationError(f"expected at least 1 sample of at least 2 tokens, found {samples} of {length}")
    if kind == "random":
        tokens = _random_tokens(facts, samples, length, seed)
        return Samples(tokens, None, f"{samples} samples of {length} random tokens, seed {seed}")
    if kind == "self":
        start = facts.require_start()
        tokens = write_text(
            directory,
            start,
            samples=samples,
            length=length,
            seed=seed,
            device=device,
            trust_remote_code=trust_remote_code,
            processes=processes,
            portion=portion,
        )
        return Samples(tokens, None, f"{samples} texts of {length} tokens that the model wrote itself, seed {seed}")

    tokenizer = load_tokenizer(directory, trust_remote_code)
    if kind == "text":
        documents, name = calibration_documents(), "the text that qinit brings"
    elif kind == "file":
        documents, name = read_file(Path(source), text_field), Path(source).name  # a card tells nobody's directories
    else:
        characters, count = (characters_for(samples, length), 1) if facts.causal else (0, 4 * samples)
        documents, name = read_hub(source, text_field, token, characters=characters, documents=count), source
    if facts.causal:
        # Joined by blank lines, as GPTQ's released code joins its calibration text (arXiv:2210.17323).
        text = "\n\n".join(documents)
        tokens = draw_windows(tokenizer, text, source, facts, samples=samples, length=length, seed=seed)
        return Samples(tokens, None, f"{_windows(tokens)} from {name}, seed {seed}")
    if kind == "text":
        documents = passages(documents, length, samples * length, seed)
        samples = len(documents)
    if kind == "file" and not is_jsonl(Path(source)):
        documents = [part for part in re.split(r"\n\s*\n", documents[0]) if part.strip()]
    tokens, mask = draw_documents(tokenizer, documents, source, facts, samples=samples, length=length, seed=seed)
    return Samples(tokens, mask, f"{len(tokens)} texts of up to {tokens.shape[1]} tokens from {name}, seed {seed}")


def check_source(
    source: str,
    directory: Path,
    config: dict[str, Any],
    text_field: str | None = None,
    *,
    trust_remote_code: bool = False,
    tokenized: bool = False,
) -> None:
    """Raise what `load_samples` would, as far as it shows without the Hub, the weights and reading JSON. `tokenized`:
    the tokenizer has been tried already."""
    kind = kind_of(source)
    _check_field(source, kind, text_field)
    facts = Facts.read(directory, config, trust_remote_code)
    if kind == "random":
        _ids_to_draw(facts)
    elif kind == "self":
        facts.require_start()
    else:
        if kind == "file":
            read_text(Path(source))
        elif kind == "hub":
            require_datasets(source)
        if not tokenized:
            load_tokenizer(directory, trust_remote_code)


def why_unreadable(directory: Path, facts: Facts, trust_remote_code: bool) -> str:
    """Say why the model in `directory` cannot read the text that qinit brings; nothing where it can."""
    try:
        tokenizer = load_tokenizer(directory, trust_remote_code)
    except CalibrationError:
        return "there is no tokenizer that could read text"
    try:
        require_readable(tokenizer, calibration_documents()[0], facts)
    except CalibrationError:
        return "the tokenizer is that of another model: it makes ids that the model does not have"
    return ""


def kind_of(source: str) -> Literal["random", "self", "text", "file", "hub"]:
    """Tell what a source is; a file of the name `self`, `text` or `random` is given as ./self.

    Raises CalibrationError for what is none of them.
    """
    if source == RANDOM:
        return "random"
    if source == SELF:
        return "self"
    if source == BUNDLED:
        return "text"
    try:
        if Path(source).exists():
            return "file"
        match = HUB_SOURCE.fullmatch(source)
        name = match["name"] if match else ""
        local = bool(name) and Path(name).exists()  # load_dataset would read that
    except OSError as error:
        raise CalibrationError(f"{source}: cannot be looked at ({error.strerror}); {SOURCES}") from None
    # A suffix is letters: data sets have names like wikitext-v1.5.
    if not name or local or name.startswith((".", "-")) or re.search(r"\.(?!v\d)[A-Za-z]\w{0,5}$", name):
        raise CalibrationError(f"{source}: no such file; {SOURCES}")
    parse_hub(source)
    return "hub"


def _check_field(source: str, kind: str, text_field: str | None) -> None:
    if text_field and (kind in ("random", "self", "text") or (kind == "file" and not is_jsonl(Path(source)))):
        raise CalibrationError(
            f"{source}: has no field '{text_field}'; a text field is for JSONL (.jsonl or .json) and data sets"
        )


def _ids_to_draw(facts: Facts) -> torch.Tensor:
    """Return the ids of the vocabulary that are not special, int64 [n]."""
    ids = torch.arange(facts.require_vocabulary())
    ids = ids[~torch.isin(ids, torch.tensor(sorted(facts.special), dtype=torch.int64))]
    if not len(ids):
        raise CalibrationError(f"{facts.config_file}: all {facts.vocabulary} ids of the vocabulary are special tokens")
    return ids


def _random_tokens(facts: Facts, samples: int, length: int, seed: int) -> torch.Tensor:
    ids = _ids_to_draw(facts)
    tokens = ids[torch.randint(len(ids), (samples, length), generator=torch.Generator().manual_seed(seed))]
    if facts.end is not None:
        tokens[:, -1] = facts.end
    return tokens


def _windows(tokens: torch.Tensor) -> str:
    count, length = tokens.shape
    return f"{count} {'window' if count == 1 else 'windows'} of {length} tokens"
