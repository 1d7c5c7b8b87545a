import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = "the quick brown fox jumps over the lazy dog " * 20


@pytest.fixture
def noise(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import noise

    yield noise
    sys.modules.pop("noise", None)


def test_noise_is_the_same_for_a_seed_and_as_much_as_was_asked(noise):
    for change in (noise.mistyped, noise.reordered):
        assert change(TEXT, 0.1, 0) == change(TEXT, 0.1, 0) != change(TEXT, 0.1, 1)
    assert noise.mistyped(TEXT, 0.0, 0) == TEXT
    changed = sum(a != b for a, b in zip(noise.reordered(TEXT, 0.1, 0).split(), TEXT.split(), strict=True))
    assert 18 < changed <= 36  # of 180 words, 18 pairs
    assert sorted(noise.reordered(TEXT, 0.3, 0).split()) == sorted(TEXT.split())
    assert noise.reordered("one two", 0.3, 0) == "two one"
    assert noise.reordered("one", 0.3, 0) == "one"
