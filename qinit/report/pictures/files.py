"""Writes a report's pictures: one PNG, and one HTML page with hover that holds all it needs and loads nothing."""

from __future__ import annotations

from pathlib import Path

from qinit.files.atomic import write_files
from qinit.report.pictures.html import page
from qinit.report.pictures.raster import png
from qinit.report.report import Report

PNG_NAME, PAGE_NAME = "report.png", "report.html"
PICTURES = (PNG_NAME, PAGE_NAME)  # `qinit report` makes them after a run's list of sums was written


def write_pictures(report: Report, directory: Path) -> tuple[Path, Path]:
    """Write report.png and report.html into a directory, each under a temporary name first; returns their paths."""
    first, second = write_files(directory, {PNG_NAME: png(report), PAGE_NAME: page(report).encode()})
    return first, second
