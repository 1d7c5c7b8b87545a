"""Figures in words, as people are told them and as they write them."""

from __future__ import annotations

import re
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


def parse_size(text: str) -> int:
    """Read `5GB`, `300MB`, `2GiB` as bytes (GB is 10^9, GiB 2^30); raises ValueError."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    upper = text.strip().upper()
    for unit, factor in units.items():
        number = upper.removesuffix(unit)
        if number != upper and number.strip().isdecimal() and int(number) > 0:
            return int(number) * factor
    raise ValueError("expected a size like 5GB or 300MiB")


def parse_time(text: str) -> float:
    """Read `10m`, `90s`, `1.5h`, or a number of minutes, as seconds; raises ValueError."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*(s|m|min|h)?", text.strip().lower(), re.ASCII)
    if not found:
        raise ValueError("expected a time like 10m, 90s or 1h")
    return float(found[1]) * {"s": 1, "h": 3600}.get(found[2], 60)
