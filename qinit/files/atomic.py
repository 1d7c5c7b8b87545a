"""Files that are whole or as they were: written under another name beside the old one, then renamed."""

from __future__ import annotations

from pathlib import Path

from qinit.errors import OutputError


def replace_text(path: Path, text: str) -> None:
    """Write a file anew under a temporary name beside it, then rename. Raises OutputError; the old one is kept then."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written ({error.strerror}); it is as it was") from None


def write_files(directory: Path, contents: dict[str, bytes]) -> list[Path]:
    """Write files into a directory, each under a temporary name first; returns their paths. Raises OutputError."""
    partial = directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            partial = directory / f".{name}.partial"
            try:
                partial.write_bytes(content)
                partial.replace(directory / name)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"{directory}: cannot be written ({error.strerror}: {partial.name}); choose another place with --out"
        ) from None
    return [directory / name for name in contents]
