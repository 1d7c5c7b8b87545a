import json
import os
import socket
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qinit.files.reading import (
    JSON_DEPTH,
    open_regular,
    parse_json,
    printable,
    read_regular,
    require_inside,
)
from tests.fuzz import changed, changes, examples, json_values

plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(st.characters(codec="utf-8"))),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4)
    ),
    max_leaves=8,
)


class TestReading:
    def test_a_file_up_to_the_limit_is_read_and_one_byte_more_is_not(self, tmp_path):
        (tmp_path / "a").write_bytes(b"12345")
        assert read_regular(tmp_path / "a", 5) == b"12345"
        with pytest.raises(OSError, match=r"has 0\.0 MB, at most 0\.0 MB are read"):
            read_regular(tmp_path / "a", 4)

    def test_what_claims_no_size_and_goes_on_is_not_read_past_the_limit(self):
        with pytest.raises(OSError, match="at most"):
            read_regular(Path("/proc/self/maps"), 10)

    @pytest.mark.parametrize("kind", ["pipe", "device", "folder", "socket", "missing", "NUL"])
    def test_what_is_no_regular_file_is_refused_at_once(self, tmp_path, monkeypatch, kind):
        monkeypatch.chdir(tmp_path)
        path = tmp_path / "x"
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "folder":
            path.mkdir()
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as made:
                made.bind("x")
        elif kind == "NUL":
            path = tmp_path / "a\0b"
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        with pytest.raises(OSError, match=r".") as caught:
            open_regular(path)
        assert caught.value.strerror
        assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


class TestInside:
    def test_files_and_links_within_are_inside(self, tmp_path):
        (tmp_path / "a").touch()
        (tmp_path / "b").symlink_to("a")
        for name in "ab":
            require_inside(tmp_path / name, tmp_path)

    def test_a_directory_that_is_a_link_is_what_it_points_to(self, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "real/a").touch()
        (tmp_path / "link").symlink_to("real")
        require_inside(tmp_path / "link/a", tmp_path / "link")

    @pytest.mark.parametrize("target", ["../secret", "/etc/hostname", "../inner-not/x"])
    def test_what_leads_out_is_not(self, tmp_path, target):
        (tmp_path / "inner").mkdir()
        (tmp_path / "inner-not").mkdir()
        for name in ("secret", "inner-not/x"):
            (tmp_path / name).touch()
        (tmp_path / "inner/a").symlink_to(target)
        if not (tmp_path / "inner/a").exists():
            pytest.skip("no such file here")
        with pytest.raises(OSError, match="leads out of the directory, to /"):
            require_inside(tmp_path / "inner/a", tmp_path / "inner")

    def test_a_snapshot_has_its_repositorys_blobs_and_nothing_else_of_the_cache(self, tmp_path):
        for place in ("mine/blobs", "mine/snapshots/1", "other/blobs"):
            (tmp_path / place).mkdir(parents=True)
        for place in ("mine/blobs/x", "mine/y", "other/blobs/z"):
            (tmp_path / place).touch()
        snapshot = tmp_path / "mine/snapshots/1"
        for name, target in {"x": "../../blobs/x", "y": "../../y", "z": "../../../other/blobs/z"}.items():
            (snapshot / name).symlink_to(target)
        require_inside(snapshot / "x", snapshot)
        for name in "yz":
            with pytest.raises(OSError, match="leads out"):
                require_inside(snapshot / name, snapshot)


class TestJson:
    @examples(30)
    @given(plain)
    def test_what_json_writes_is_read(self, value):
        assert parse_json(json.dumps(value).encode()) == value
        assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value

    @examples(50)
    @given(st.binary(max_size=60) | st.builds(changed, json_values.map(lambda v: json.dumps(v).encode()), changes))
    def test_fuzz_anything_else_is_a_value_error(self, raw):
        with suppress(ValueError):
            json.dumps(parse_json(raw), ensure_ascii=False).encode()

    def test_depth_is_bounded_and_what_is_within_is_read(self):
        for depth in (1, JSON_DEPTH):
            parse_json(b"[" * depth + b"]" * depth)
        with pytest.raises(ValueError, match="nested more than 64 deep"):
            parse_json(b'{"a":' * (JSON_DEPTH + 1) + b"1" + b"}" * (JSON_DEPTH + 1))


@examples(30)
@given(st.text())
def test_what_is_printable_is_encodable_and_moves_no_cursor(text):
    shown = printable(text)
    assert shown.encode().decode() == shown
    assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in shown)
    assert printable(shown) == shown


@pytest.mark.parametrize("text", ["plain", "größer", "模型", "😀", "a\\b"])
def test_other_text_stays_as_it_is(text):
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [("\x1b[2J", "\\x1b[2J"), ("a\nb", "a\\nb"), ("\u202eexe.txt", "\\u202eexe.txt"), ("\x9b", "\\x9b")],
)
def test_what_steers_a_terminal_is_shown_as_an_escape(text, shown):
    assert printable(text) == shown
