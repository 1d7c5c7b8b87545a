"""Text for encoders, which people give single sentences as well as pages: documents cut to passages of all lengths."""

from __future__ import annotations

import math
import random
import re

SHORTEST = 16  # tokens of a passage: a short sentence
CHARACTERS = 4  # of a token, about
END = re.compile(r"(?<=[.!?;:])\s+|\n+")  # of a sentence, or of a line


def passages(documents: list[str], longest: int, tokens: int, seed: int) -> list[str]:
    """Return passages of the documents that have about so many tokens together, or all; cut at the ends of sentences,
    from some SHORTEST to some `longest` tokens: as many of 16 to 32 as of 32 to 64, and so on. The same seed gives the
    same passages."""
    generator = random.Random(seed)
    low, high = (math.log(CHARACTERS * tokens) for tokens in (min(SHORTEST, longest), longest))
    found: list[str] = []
    for document in documents:
        start, wanted = 0, generator.uniform(low, high)
        for end in (*(match.start() for match in END.finditer(document)), len(document)):
            if end - start >= math.exp(wanted) or end == len(document):
                found.append(document[start:end].strip())
                start, wanted = end, generator.uniform(low, high)
    found = [passage for passage in found if passage]
    drawn, characters = set(), 0
    for number in generator.sample(range(len(found)), len(found)):
        if characters >= CHARACTERS * tokens:
            break
        drawn.add(number)
        characters += min(len(found[number]), CHARACTERS * longest)
    return [found[number] for number in sorted(drawn)]
