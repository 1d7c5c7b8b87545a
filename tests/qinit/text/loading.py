"""Text for the tiny readers, loaded or refused as a run does it."""

import json

import pytest

from qinit.errors import CalibrationError
from qinit.source.checkpoint import read_json
from qinit.text.sources import check_source, load_samples

IDS = list(range(4, 254))  # 250 words: 31 windows of 8, 2 left over


def load(source, directory, *, samples=4, length=8, seed=0, **options):
    config = read_json(directory / "config.json", "")
    check_source(str(source), directory, config)
    return load_samples(str(source), directory, config, samples=samples, length=length, seed=seed, **options)


def refusal(source, directory, *, planned=True, config=None, **options):
    """Return the one line that refuses; where `planned`, planning already says the same."""
    config = read_json(directory / "config.json", "") if config is None else config
    options = {"samples": 4, "length": 8, "seed": 0, **options}
    with pytest.raises(CalibrationError) as caught:
        load_samples(str(source), directory, config, **options)
    message = str(caught.value)
    assert "\n" not in message
    if planned:
        with pytest.raises(CalibrationError) as early:
            check_source(str(source), directory, config)
        assert str(early.value) == message
    else:
        check_source(str(source), directory, config)
    return message


def write_rows(path, *rows):
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
