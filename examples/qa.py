"""Fine-tune what qinit wrote on question answering, and measure exact match and F1 before and after.

    python examples/qa.py DIR --dataset trivia_qa --out trained
    python examples/qa.py DIR --steps 40 --rate 0.01    five questions that lie here: it runs offline, and shows no more

DIR is a run (`qinit eqft`), or an adapter that names its base (`qinit adapter`, `qinit merge --adapters`, a trainer's).
"""

from __future__ import annotations

import argparse
import json
import re
import string
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from datasets import load_dataset
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from qinit import QinitError
from qinit.evaluate.loaded import class_name
from qinit.evaluate.subject import find_subject
from qinit.loading import load_parts

SAMPLE = Path(__file__).with_name("qa.jsonl")
PROMPT = "Question: {}\nAnswer:"
LONGEST = 24  # tokens of an answer
IGNORED = -100  # a label that the loss passes over


class Row(NamedTuple):
    """A question and all answers that count; the first one is trained on."""

    question: str
    answers: list[str]


def read(dataset: str, split: str, count: int) -> list[Row]:
    """Return the first questions of a split: TriviaQA without its documents, NQ-Open, or the sample, which has one."""
    if dataset == "sample":
        return [Row(**json.loads(line)) for line in SAMPLE.read_text(encoding="utf-8").splitlines()[:count]]
    part = f"{split}[:{count}]"
    if dataset == "nq_open":
        found = load_dataset("google-research-datasets/nq_open", split=part)
        return [Row(row["question"], row["answer"]) for row in found]
    found = load_dataset("mandarjoshi/trivia_qa", "unfiltered.nocontext", split=part)
    return [Row(row["question"], [row["answer"]["value"], *row["answer"]["aliases"]]) for row in found]


def encode(row: Row, tokenizer: Any) -> dict[str, list[int]]:
    """Return prompt, answer and end as tokens; the labels are those of answer and end alone."""
    prompt = tokenizer(PROMPT.format(row.question)).input_ids
    answer = tokenizer(f" {row.answers[0]}", add_special_tokens=False).input_ids
    tokens = [*prompt, *answer, tokenizer.eos_token_id]
    labels = [IGNORED] * len(prompt) + tokens[len(prompt) :]
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}


def normalized(answer: str) -> str:
    """Return an answer as SQuAD compares it: lower case, no punctuation, no articles, single spaces."""
    plain = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def exact_match(found: str, answers: list[str]) -> float:
    """Return 1 where one of the answers was found, else 0."""
    return float(normalized(found) in map(normalized, answers))


def f1(found: str, answers: list[str]) -> float:
    """Return the harmonic mean of precision and recall, by words, for the answer where it is largest."""
    return max(_f1(normalized(found).split(), normalized(answer).split()) for answer in answers)


def _f1(found: list[str], expected: list[str]) -> float:
    if not found or not expected:
        return float(found == expected)
    return 2 * sum((Counter(found) & Counter(expected)).values()) / (len(found) + len(expected))


def answers(model: Any, tokenizer: Any, rows: list[Row], batch: int) -> list[str]:
    """Answer greedily, each up to the end of a line."""
    model.eval()
    found = []
    for start in range(0, len(rows), batch):
        prompts = [PROMPT.format(row.question) for row in rows[start : start + batch]]
        asked = tokenizer(prompts, padding=True, padding_side="left", return_token_type_ids=False, return_tensors="pt")
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        tokens = model.generate(**asked.to(model.device), max_new_tokens=LONGEST, do_sample=False, **ends)
        texts = tokenizer.batch_decode(tokens[:, asked.input_ids.shape[1] :], skip_special_tokens=True)
        found += [text.strip().partition("\n")[0] for text in texts]
    return found


def scores(found: list[str], rows: list[Row]) -> dict[str, float]:
    """Return the means of exact match and F1, in per cent."""
    pairs = [(text, row.answers) for text, row in zip(found, rows, strict=True)]
    return {how.__name__: 100 * fmean(how(*pair) for pair in pairs) for how in (exact_match, f1)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("--dataset", choices=("sample", "trivia_qa", "nq_open"), default="sample")
    parser.add_argument("--out", type=Path, help="where the trained adapter goes (default: it is not kept)")
    parser.add_argument("--train", type=int, default=4000, help="questions to train on (default 4000)")
    parser.add_argument("--measure", type=int, default=500, help="questions to measure on (default 500)")
    parser.add_argument("--steps", type=int, default=250, help="of training (default 250)")
    parser.add_argument("--batch", type=int, default=16, help="questions at once (default 16)")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate (default 1e-4)")
    given = parser.parse_args(arguments)
    device, dtype = ("cuda", "auto") if torch.cuda.is_available() else ("cpu", torch.float32)
    try:
        subject = find_subject(given.directory, None, None)
        if subject.adapter is None:
            parser.error(f"{given.directory}: holds no adapter to train")
        train, test = read(given.dataset, "train", given.train), read(given.dataset, "validation", given.measure)
        parts = subject.base, subject.adapter, class_name(subject), subject.config
        model = load_parts(*parts, trainable=True, dtype=dtype, device=device)
    except (QinitError, OSError) as error:  # the latter when a data set cannot be fetched
        parser.error(str(error))
    tokenizer = AutoTokenizer.from_pretrained(subject.base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    before = answers(model, tokenizer, test, given.batch)
    settings = TrainingArguments(
        output_dir=str(given.out or "qa"),
        max_steps=given.steps,
        per_device_train_batch_size=given.batch,
        learning_rate=given.rate,
        bf16=device == "cuda",
        gradient_checkpointing=True,  # else a packed base keeps every layer's unpacked weight for the backward pass
        gradient_checkpointing_kwargs={"use_reentrant": False},
        save_strategy="no",
        report_to="none",
    )
    encoded: Any = [encode(row, tokenizer) for row in train]
    Trainer(model, settings, DataCollatorForSeq2Seq(tokenizer), encoded).train()
    after = answers(model, tokenizer, test, given.batch)
    if given.out is not None:
        model.save_pretrained(given.out)
    print(json.dumps({"before": scores(before, test), "after": scores(after, test)}))


if __name__ == "__main__":
    main()
