"""Errors that a user can cause and can fix. The command line prints them as one line and exits with 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QinitError(Exception):
    """Base of all errors with a cause outside qinit. The message names what, where and what to do."""


class CheckpointError(QinitError):
    """The source checkpoint is missing, damaged or of a kind that qinit does not read."""


class RecipeError(QinitError):
    """An option or a recipe key is unknown or out of range, or two of them do not fit together."""


class TargetError(QinitError):
    """The modules to quantize cannot be found in the model."""


class CalibrationError(QinitError):
    """The calibration samples are missing, too few or do not fit the model."""


class DatasetError(QinitError):
    """The labelled data to train on has no such columns, or labels that are no classes."""


class OutputError(QinitError):
    """The result cannot be written where it was asked for."""


class ReportError(QinitError):
    """A run's report is missing or damaged, or cannot be drawn here."""


class CompareError(QinitError):
    """What is to be compared, or the text to do it on, does not fit."""


class HubError(QinitError):
    """The Hub refused, or cannot be reached."""


class ProcessesError(QinitError):
    """The processes that were started for one run do not fit together."""


class LostError(ProcessesError):
    """Another process of the run is gone; what is finished is kept."""


class FullError(QinitError):
    """The memory of a device is used up; what is finished is kept."""


class StoppedError(QinitError):
    """Ctrl-C; the message says what is left behind or kept. The command line exits with 130."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the closest choice, or an empty string when none is close."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""
