"""A tokenizer as llama.cpp has it, from tokenizer.json: byte-level BPE, whose way to cut text into words has a name
there, or BPE made of a SentencePiece model, whose merges become scores.

The name goes by what tokenizer.json does, not by the model's: the expressions of src/llama-vocab.cpp are compared with
it. A model without a tokenizer gets none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qinit.source.checkpoint import read_json

if TYPE_CHECKING:
    from gguf import GGUFWriter

FILE = "tokenizer.json"
OTHER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's types of tokens
SPACE = "\u2581"
# Regular expressions of Split -> llama.cpp's name, and whether it looks a whole word up before it merges.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    _WORDS + r"\p{N}{1,3}" + _REST: ("llama-bpe", True),
    _WORDS + r"\p{N}" + _REST: ("qwen2", False),
    _CASED: ("tekken", True),
}


@dataclass(frozen=True)
class Vocabulary:
    """`pre` names how text is cut into words. `starts`: whether a text gets bos in front. Without `directory` there is
    no tokenizer."""

    model: str
    directory: Path | None = None
    pre: str = "default"
    tokens: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    space_prefix: bool = True
    starts: bool = False

    def add_to(self, writer: GGUFWriter) -> None:
        """Write it as llama.cpp's keys, with the special tokens and the chat template that lie beside the file."""
        from gguf import SpecialVocab

        writer.add_tokenizer_model(self.model)
        if self.directory is None:
            return
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.space_prefix)
        special = SpecialVocab(self.directory, load_merges=not self.scores, n_vocab=len(self.tokens))
        special.add_special_token["bos"] = self.starts
        special.add_to_gguf(writer, quiet=True)


def read_vocabulary(directory: Path, size: int) -> Vocabulary | str:
    """Return a checkpoint's tokenizer for a model of `size` tokens, or why llama.cpp has none that does the same."""
    if not (directory / FILE).is_file():
        others = [name for name in OTHER_FILES if (directory / name).is_file()]
        advice = "save it as tokenizer.json: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        return f"its tokenizer lies in {others[0]}; {advice}" if others else Vocabulary("none")
    found = read_json(directory / FILE, "")
    model = found.get("model") or {}
    if model.get("type") != "BPE":
        return f"{FILE} is of type {model.get('type')}, and what llama.cpp reads here is BPE"
    scores, pre = [], "default"
    whole = bool(model.get("byte_fallback"))
    if not whole:
        named = _pre_tokenizer(found)
        if named is None:
            return f"{FILE} cuts text into words as none of llama.cpp's pre-tokenizers does"
        pre, looks_up = named
        if looks_up != bool(model.get("ignore_merges")):
            return f"{FILE} has ignore_merges {bool(model.get('ignore_merges'))}, and llama.cpp's '{pre}' the other"
    tokens, types = _tokens(found, size, whole)
    if len(tokens) > size:
        return f"{FILE} has ids up to {len(tokens) - 1}, and the model knows {size}"
    if whole:
        scores = _scores(tokens, types, model["merges"])
    name = "llama" if whole else "gpt2"
    return Vocabulary(name, directory, pre, tokens, types, scores, _space_prefix(found), _starts(directory / FILE))


def _pre_tokenizer(found: dict[str, Any]) -> tuple[str, bool] | None:
    """Return llama.cpp's name for the way in which byte-level BPE cuts words, and whether that looks whole words up."""
    outer = found.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer])
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    first = steps[:-1]
    if last.get("use_regex", True):
        if not first:
            return "gpt-2", False
        digits = len(first) == 1 and first[0].get("type") == "Digits" and first[0].get("individual_digits")
        return ("smollm", False) if digits else None
    split = first[0] if len(first) == 1 and first[0].get("type") == "Split" else {}
    isolated = split.get("behavior") == "Isolated" and not split.get("invert")
    return SPLITS.get((split.get("pattern") or {}).get("Regex", "")) if isolated else None


def _tokens(found: dict[str, Any], size: int, whole: bool) -> tuple[list[str], list[int]]:
    """Return tokens and their types by id; ids that no token has are filled up to `size`."""
    by_id: dict[int, tuple[str, int]] = {}
    unknown = found["model"].get("unk_token")
    for token, index in found["model"]["vocab"].items():
        byte = whole and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        by_id[index] = token, BYTE if byte else UNKNOWN if whole and token == unknown else NORMAL
    for added in found.get("added_tokens") or ():
        token, index = added["content"], added["id"]
        if whole and token == unknown:
            continue
        marked = added.get("special") or (token.startswith("<|") and token.endswith("|>"))
        by_id[index] = (token, CONTROL) if marked else (token.replace(SPACE, " "), USER_DEFINED)
    filled = [by_id.get(i, (f"[PAD{i}]", UNUSED)) for i in range(max(size, max(by_id) + 1))]
    return [token for token, _ in filled], [kind for _, kind in filled]


def _scores(tokens: list[str], types: list[int], merges: list[Any]) -> list[float]:
    """Return scores with which llama.cpp merges as tokenizer.json does. It merges what makes the token of the highest
    score, the other the earliest in its list of merges: a token's score is how early it is made there."""
    made: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        made.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    last = len(merges)
    return [0.0 if kind != NORMAL else -float(made.get(token, last)) for token, kind in zip(tokens, types, strict=True)]


def _space_prefix(found: dict[str, Any]) -> bool:
    """Whether a text gets a space in front."""
    normalizer, pre = found.get("normalizer") or {}, found.get("pre_tokenizer") or {}
    if any(step.get("type") == "Prepend" for step in normalizer.get("normalizers", [normalizer])):
        return True
    return pre.get("type") == "Metaspace" and pre.get("prepend_scheme", "always") != "never"


def _starts(file: Path) -> bool:
    """Whether the tokenizer puts a token in front of a text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    alone, whole = (tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
    return whole[:1] != alone[:1]
