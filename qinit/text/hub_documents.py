"""Calibration text from a data set on the Hub, through the optional package `datasets`. Uses the network."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qinit.errors import CalibrationError, HubError, did_you_mean
from qinit.hub.errors import checked_token, without_token
from qinit.recipe import NAMED_TEXTS
from qinit.text.documents import not_blank, text_of

DEFAULT_SPLIT = "train"
INSTALL = 'pip install "qinit[datasets]"'
HUB_SOURCE = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.-]+))?")
# load_dataset takes these for its readers of local files, and reads whatever lies in the working directory.
FILE_READERS = {"arrow", "csv", "json", "pandas", "parquet", "sql", "text", "webdataset", "xml"}


def read_hub(
    source: str,
    text_field: str | None,
    token: str | None,
    *,
    characters: float,
    documents: int,
    blanks: bool = False,
    split: str = DEFAULT_SPLIT,
) -> list[str]:
    """Stream a Hub data set `name[:config][@split]` from its start; return its documents, those that are blank only if
    `blanks`, until there are `documents` of them with `characters` altogether. Only that much is fetched. `split` is
    read where the source names none.

    Raises CalibrationError for text that is not there, HubError in one line, without the token, for anything else.
    """
    spec = parse_hub(source)
    token = checked_token(source, token)
    load_dataset = _load_dataset(source)
    found: list[str] = []
    rows = size = 0
    try:
        with _no_progress_bar():
            data = load_dataset(spec["name"], spec["config"], split=spec["split"] or split, streaming=True, token=token)
            for row in data:
                rows += 1
                text = text_of(row, text_field, f"{source}, row {rows}")
                if blanks or text.strip():
                    found.append(text)
                    size += len(text)
                if size >= characters and len(found) >= documents:
                    break
    except CalibrationError:
        raise
    except Exception as error:  # a data set can fail in any way: HTTP, files, formats
        raise _hub_error(source, error, token) from None
    kept = not_blank(found, source, text_field)
    return found if blanks else kept


def parse_hub(source: str) -> dict[str, str | None]:
    """Return name, config and split of `name[:config][@split]`; what is not given is None.

    Raises CalibrationError for what cannot be a data set's id, or is the name of a file reader.
    """
    match = HUB_SOURCE.fullmatch(source)
    if not match:
        raise CalibrationError(f"{source}: no data set id (those look like 'owner/name:config@split')")
    if match["name"] in FILE_READERS:
        raise CalibrationError(f"{source}: is the name of a file format, not of a data set; give the file itself")
    return match.groupdict()


def require_datasets(source: str) -> None:
    """Raise CalibrationError with the command to run when the package that reads Hub data sets is missing."""
    if importlib.util.find_spec("datasets") is None:
        raise CalibrationError(f"{source}: data sets from the Hub need the package `datasets`: {INSTALL}")


def _load_dataset(source: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CalibrationError(
            f"{source}: the package `datasets` cannot be imported ({error}); install it: {INSTALL}"
        ) from None
    return load_dataset


def _hub_error(source: str, error: Exception, token: str | None) -> HubError:
    reason = without_token(str(error), token)
    kind = type(error).__name__
    hint = did_you_mean(source, NAMED_TEXTS)
    if kind == "DatasetNotFoundError":
        return HubError(
            f"{source}: no such file here and no such data set on the Hub{hint} (a private or gated one needs HF_TOKEN)"
        )
    if isinstance(error, ConnectionError) or "Connect" in kind or "OfflineModeIsEnabled" in kind + reason:
        return HubError(
            f"{source}: no such file here{hint}, and the Hub cannot be reached; check the name and the network, "
            "or give a local file"
        )
    return HubError(
        f"{source}: the data set cannot be read ({kind}: {reason[:400]}); a configuration and a split are given as "
        "owner/name:config@split"
    )


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hidden = are_progress_bars_disabled()
    if not hidden:
        disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            enable_progress_bars()
