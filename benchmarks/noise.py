"""Seeded noise in a text: characters that are mistyped, and words that change places."""

from __future__ import annotations

import random
import string

LETTERS = string.ascii_lowercase


def mistyped(text: str, share: float, seed: int) -> str:
    """Change a `share` of the characters, each in one of four ways with the same chance: left out, doubled, another
    letter in its place, or changed places with the next. The same for the same text and seed."""
    chance, found, at = random.Random(f"{seed} {text}"), [], 0
    while at < len(text):
        here, after = text[at], text[at + 1 : at + 2]
        if chance.random() >= share:
            found.append(here)
        else:
            kind = chance.choice(("out", "twice", "other", "places"))
            found.append({"out": "", "twice": here * 2, "other": chance.choice(LETTERS), "places": after + here}[kind])
            at += kind == "places"
        at += 1
    return "".join(found)


def reordered(text: str, share: float, seed: int) -> str:
    """Swap a `share` of the words, at least one, each with the word after it. The same for the same text and seed."""
    words = text.split()
    chance = random.Random(f"{seed} {text}")
    for at in chance.sample(
        range(max(0, len(words) - 1)), min(max(1, round(share * len(words))), max(0, len(words) - 1))
    ):
        words[at], words[at + 1] = words[at + 1], words[at]
    return " ".join(words)


NOISES = {
    "typos": lambda text, seed: mistyped(text, 0.1, seed),
    "word swaps": lambda text, seed: reordered(text, 0.3, seed),
}
