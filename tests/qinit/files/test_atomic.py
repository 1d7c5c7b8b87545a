import errno
from pathlib import Path

import pytest

from qinit.errors import OutputError
from qinit.files.atomic import replace_text, write_files
from tests.helpers import contents


@pytest.fixture(params=["written", "renamed"])
def full(request, monkeypatch):
    """Let the disk be full after half of a file, or when a file is to take its name; `what` says which file."""
    written, replaced = Path.write_bytes, Path.replace

    def start(what: str) -> None:
        def write(path: Path, data: bytes) -> int:
            if what in path.name:
                written(path, data[: len(data) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")
            return written(path, data)

        def write_text(path: Path, text: str, encoding: str) -> int:
            return write(path, text.encode(encoding))

        def replace(path: Path, target: Path) -> Path:
            if what in path.name:
                raise OSError(errno.ENOSPC, "No space left on device")
            return replaced(path, target)

        if request.param == "written":
            monkeypatch.setattr(Path, "write_bytes", write)
            monkeypatch.setattr(Path, "write_text", write_text)
        else:
            monkeypatch.setattr(Path, "replace", replace)

    return start


class TestReplaceText:
    def test_the_file_is_made_or_replaced_and_nothing_else_is_left(self, tmp_path):
        for text in ("one", "größer\n"):
            replace_text(tmp_path / "a.json", text)
            assert contents(tmp_path) == {"a.json": text.encode()}

    def test_a_file_that_cannot_be_written_is_as_it_was(self, tmp_path, full):
        (tmp_path / "a.json").write_bytes(b"before")
        full("a.json")
        with pytest.raises(OutputError, match=r"a\.json: cannot be written \(No space left on device\); it is as it"):
            replace_text(tmp_path / "a.json", "after, and longer")
        assert contents(tmp_path) == {"a.json": b"before"}

    def test_a_reader_sees_the_old_text_or_the_new_one(self, tmp_path, monkeypatch):
        (tmp_path / "a.json").write_text("before")
        seen, replaced = [], Path.replace

        def replace(path, target):
            seen.append(target.read_text())
            return replaced(path, target)

        monkeypatch.setattr(Path, "replace", replace)
        replace_text(tmp_path / "a.json", "after")
        assert seen == ["before"]
        assert (tmp_path / "a.json").read_text() == "after"


class TestWriteFiles:
    def test_the_directory_is_made_and_the_paths_are_returned_in_their_order(self, tmp_path):
        found = write_files(tmp_path / "new/place", {"b": b"1", "a": b"\0\xff"})
        assert found == [tmp_path / "new/place/b", tmp_path / "new/place/a"]
        assert contents(tmp_path) == {"new/place/a": b"\0\xff", "new/place/b": b"1"}

    def test_what_fails_leaves_the_files_that_were_there_and_no_half(self, tmp_path, full):
        write_files(tmp_path, {"a": b"before", "b": b"before", "other": b"another's"})
        full(".b.")
        with pytest.raises(OutputError, match=r"cannot be written \(No space left on device: \.b\.partial\)"):
            write_files(tmp_path, {"a": b"after", "b": b"after", "c": b"after"})
        assert contents(tmp_path) == {"a": b"after", "b": b"before", "other": b"another's"}

    def test_a_place_that_is_a_file_is_refused(self, tmp_path):
        (tmp_path / "file").write_bytes(b"x")
        with pytest.raises(OutputError, match="choose another place with --out"):
            write_files(tmp_path / "file", {"a": b""})
        assert contents(tmp_path) == {"file": b"x"}
