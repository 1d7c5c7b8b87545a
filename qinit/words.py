"""Figures in words, for people."""

from __future__ import annotations

from datetime import datetime


def duration(seconds: float) -> str:
    """Say a time in one unit, to two digits."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{float(f'{seconds / size:.2g}'):g} {unit}"
    return f"{max(1, round(seconds))} s"


def moment(text: str) -> str:
    """Show a time in the local zone."""
    try:
        return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return text
