"""A report as pictures: one PNG, and one HTML page with hover that holds all it needs and loads nothing."""

from __future__ import annotations

from pathlib import Path

from qinit.files.atomic import write_files
from qinit.pictures.contents import NO_FRONT, Grid, bits_words, heading, pareto_front, summary
from qinit.pictures.html import page
from qinit.pictures.raster import png
from qinit.report import Report

__all__ = [
    "NO_FRONT",
    "Grid",
    "bits_words",
    "heading",
    "page",
    "pareto_front",
    "png",
    "summary",
    "write_files",
    "write_pictures",
]


PNG_NAME, PAGE_NAME = "report.png", "report.html"


def write_pictures(report: Report, directory: Path) -> tuple[Path, Path]:
    """Write report.png and report.html into a directory, each under a temporary name first; returns their paths."""
    first, second = write_files(directory, {PNG_NAME: png(report), PAGE_NAME: page(report).encode()})
    return first, second
