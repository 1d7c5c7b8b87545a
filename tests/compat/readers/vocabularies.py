"""Tokenizers of every kind that an export to GGUF knows, each trained on the text that comes with qinit, and what
llama.cpp makes of them beside transformers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from qinit.exports import FinishedRun
from qinit.exports.gguf.vocabulary import SPACE, SPLITS
from qinit.exports.write import export
from qinit.text.bundled import calibration_documents, check_documents
from tests.helpers import quantize
from tests.models import make_checkpoint

HERE = Path(__file__).parent
SIZE = 1200
TEXTS = 400  # lines of the text that no tokenizer was trained on
LIMIT = 300  # seconds
# Of the texts. llama.cpp's expression for 'tekken' has no class for combining marks (src/llama-vocab.cpp).
DIFFERENT = {"tekken": 0.005}
ODD = [
    *(
        "",
        " ",
        "  ",
        "   a  b",
        "a\n\n\nb",
        "\tx\t\ty",
        " \n \n",
        "a ",
        "\r\nb",
        "it's  we'LL I'M",
        "x=1234567;y=3.14159",
    ),
    *(
        "Ünïcödé naïve Ærø",
        "日本語と中文混ぜ",
        "Привет, мир!",
        "שלום עולם",
        "👩‍👩‍👧 🙂🙃",
        "a\u00a0b\u2003c",
        "e\u0301 \u0301",
        "ﬁ ½ ²³",
    ),
    *(
        "!!??...---",
        "://www.x.y/z?q=1&r=2#s",
        "__init__(self, *a, **k):",
        "<b>bold</b>",
        "$12,345.67 50% #1",
        "ABCdefGHIjkl",
    ),
    *("٣٤٥ ৭৮ Ⅷ", "x" * 70, "0" * 40, "don\u2019t \u201cquote\u201d", "a/b\\c", "\u200bzero\u200bwidth"),
]


def _bytes(*steps: Any, ignore_merges: bool = False) -> dict[str, Any]:
    """Train BPE on bytes, behind these steps of cutting."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator(calibration_documents(), trainer)
    return json.loads(tokenizer.to_str())


def _sentence_pieces() -> dict[str, Any]:
    """BPE with a token for each byte that has none else, as Llama 2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=SIZE - 259, limit_alphabet=200, show_progress=False)
    tokenizer.train_from_iterator(calibration_documents(), trainer)
    found = json.loads(tokenizer.to_str())
    special = ["<unk>", "<s>", "</s>"]
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *found["model"]["vocab"]]
    found["model"] |= {
        **{"vocab": {name: index for index, name in enumerate(names)}, "unk_token": "<unk>"},
        **{"byte_fallback": True, "fuse_unk": True},
    }
    shared = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    found["added_tokens"] = [{"id": index, "content": name, **shared} for index, name in enumerate(special)]
    steps = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    whole = Tokenizer(models.BPE())
    whole.normalizer = steps
    found["normalizer"], found["pre_tokenizer"] = json.loads(whole.to_str())["normalizer"], None
    return found


def _split(pattern: str, *, looks_up: bool) -> Callable[[], dict[str, Any]]:
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return lambda: _bytes(cut, last, ignore_merges=looks_up)


PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False)
KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "gpt-2": lambda: _bytes(PLAIN),
    "smollm": lambda: _bytes(pre_tokenizers.Digits(individual_digits=True), PLAIN),
    **{name: _split(pattern, looks_up=looks_up) for pattern, (name, looks_up) in SPLITS.items()},
    "sentence pieces": _sentence_pieces,
}


def runs(place: Path) -> Iterator[tuple[str, Path]]:
    """Make a run with a tokenizer of each kind."""
    for name, made in KINDS.items():
        source = make_checkpoint(place / f"{name}-source", "llama", "float32", vocab_size=SIZE)
        (source / "tokenizer.json").write_text(json.dumps(made()), encoding="utf-8")
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings |= {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} if name == "sentence pieces" else {}
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
        quantize(source, place / f"{name}-run", format="dense")
        yield name, place / f"{name}-run"


def texts(document: str | None = None) -> list[str]:
    """Return lines of a text, by default of what qinit checks runs on, and odd ones."""
    lines = [line for line in (document or "\n".join(check_documents())).split("\n") if line.strip()]
    return [*ODD, *lines[:: max(1, len(lines) // TEXTS)]]


def compare(run: Path, place: Path, programs: Path, given: list[str]) -> tuple[float, str]:
    """Export a run and encode texts by both; return the share of them that have other ids, and all in words. Raises
    AssertionError where they cannot be encoded."""
    from transformers import AutoTokenizer

    out = place / f"{run.name}-tokens"
    export(FinishedRun.open(run), "gguf", out, requantize=True)
    (out / "texts.json").write_text(json.dumps(given))
    files = [out / name for name in ("model.gguf", "texts.json", "ids.json")]
    command = [programs / "python", HERE / "tokens_by_llama_cpp.py", *files]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=LIMIT, check=False)
    if done.returncode:
        raise AssertionError("\n".join(done.stderr.splitlines()[-20:]))
    tokenizer = AutoTokenizer.from_pretrained(run)
    wanted = [tokenizer(text)["input_ids"] for text in given]
    other = [
        (text, a, b) for text, a, b in zip(given, wanted, json.loads(files[-1].read_text()), strict=True) if a != b
    ]
    told = f"{len(given)} texts, {len(other)} of them with other ids than in transformers"
    if other:
        text, a, b = min(other, key=lambda each: len(each[0]))
        first = next(i for i, pair in enumerate(zip_longest(a, b)) if pair[0] != pair[1])
        told += f", as {text!r} from its token {first} on ({a[first:][:5]} there, {b[first:][:5]} here)"
    return len(other) / len(given), told
