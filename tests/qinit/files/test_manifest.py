"""The list of sums beside a run."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qinit.errors import ReportError
from qinit.files.manifest import MANIFEST_NAME, file_sum, listed, read_manifest, refresh, write_manifest
from tests.fuzz import changed, changes, examples, file_of, only_qinit_errors


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "part").mkdir()
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "part" / "b c.bin").write_bytes(bytes(range(256)) * 5000)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x").write_text("not ours")
    write_manifest(tmp_path)
    return tmp_path


def test_lists_every_visible_file_but_itself(directory: Path) -> None:
    assert listed(directory) == ["a.json", "part/b c.bin"]
    assert read_manifest(directory) == {name: file_sum(directory / name) for name in listed(directory)}
    assert not (directory / f".{MANIFEST_NAME}.tmp").exists()


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_sha256sum_reads_it(directory: Path) -> None:
    def check() -> int:
        return subprocess.run(["sha256sum", "--check", "--quiet", MANIFEST_NAME], cwd=directory).returncode

    assert check() == 0
    (directory / "a.json").write_text("[]")
    assert check() == 1


def test_refresh_believes_all_but_the_named_files(directory: Path) -> None:
    before = read_manifest(directory)
    (directory / "a.json").write_text("[]")
    (directory / "part" / "b c.bin").write_bytes(b"damaged")
    refresh(directory, ["a.json"])
    after = read_manifest(directory)
    assert after["a.json"] == file_sum(directory / "a.json") != before["a.json"]
    assert after["part/b c.bin"] == before["part/b c.bin"] != file_sum(directory / "part" / "b c.bin")


def test_refresh_without_a_list_makes_none(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    refresh(tmp_path, ["a"])
    assert not (tmp_path / MANIFEST_NAME).exists()


def test_every_flipped_bit_of_the_list_is_found(directory: Path) -> None:
    path = directory / MANIFEST_NAME
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            with pytest.raises(ReportError, match=f"{MANIFEST_NAME}: damaged"):
                read_manifest(directory)


def test_cut_short_or_missing(directory: Path) -> None:
    path = directory / MANIFEST_NAME
    whole = path.read_bytes()
    for end in (0, 10, len(whole) - 30, len(whole) // 2):
        path.write_bytes(whole[:end])
        with pytest.raises(ReportError, match="damaged"):
            read_manifest(directory)
    path.unlink()
    with pytest.raises(ReportError, match="cannot be read"):
        read_manifest(directory)


def listing(names):
    """A list of sums with a right last line, whoever wrote it."""
    lines = [f"{hashlib.sha256(b'').hexdigest()}  {name}" for name in names]
    whole = "".join(f"{line}\n" for line in lines)
    return f"{whole}# {hashlib.sha256(whole.encode()).hexdigest()}\n".encode()


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "./a", "a//b", "a/", "..", ".", "a\x1b[2Jb", "a\rb", "\u202ea"]
)
def test_a_list_with_a_name_that_is_no_file_below_it_is_refused(tmp_path, name):
    (tmp_path / MANIFEST_NAME).write_bytes(listing(["a", name]))
    with pytest.raises(
        ReportError, match=r"SHA256SUMS: lists '.*', which is no file below it, so qinit did not write it"
    ):
        read_manifest(tmp_path)


def test_a_list_with_a_file_twice_is_refused(tmp_path):
    (tmp_path / MANIFEST_NAME).write_bytes(listing(["a", "b", "a"]))
    with pytest.raises(ReportError, match="lists a file twice"):
        read_manifest(tmp_path)


def test_a_list_that_is_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / MANIFEST_NAME)
    with pytest.raises(ReportError, match="not a regular file"):
        read_manifest(tmp_path)


@examples(30)
@given(st.binary(max_size=60) | st.builds(changed, st.just(listing(["a", "b/c.txt"])), changes))
def test_fuzz_bytes_are_a_list_or_refused(raw):
    with file_of(raw, MANIFEST_NAME) as file, only_qinit_errors():
        assert read_manifest(file.parent).keys() == {"a", "b/c.txt"} or raw in (listing([]), listing(["a"]))


@examples(30)
@given(st.lists(st.text(min_size=1, max_size=8) | st.sampled_from(["..", "/", "a/../b"]), max_size=3))
def test_fuzz_every_name_that_is_listed_is_below_the_directory(names):
    with file_of(b"", "x") as file, only_qinit_errors():
        try:
            (file.parent / MANIFEST_NAME).write_bytes(listing(names))
        except UnicodeEncodeError:
            return
        for name in read_manifest(file.parent):
            assert os.path.normpath(file.parent / name) == f"{file.parent}/{name}"
