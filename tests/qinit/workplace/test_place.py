import errno
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from qinit.errors import OutputError
from qinit.events import Finished
from qinit.workplace.place import partial_of
from tests.broken_off import PLAIN, TEXT, break_off, fail_at_layer, finish, start
from tests.helpers import everything, names, quantize, weights_of


def test_nothing_of_the_broken_off_run_is_left_in_the_result(strong_llama, place):
    break_off(strong_llama, place / "out", 9, **TEXT)
    partial = partial_of(place / "out")
    (partial / "scratch").mkdir()
    (partial / "scratch/states").write_bytes(b"x")
    finish(strong_llama, place / "out", **TEXT)
    assert names(place) == ["out"]
    assert not [path for path in (place / "out").rglob("*") if path.name.startswith(".")]


def test_nothing_stands_at_the_final_name_before_the_end(tiny_llama, place):
    for event in start(tiny_llama, place / "out", **PLAIN):
        assert (place / "out").exists() == isinstance(event, Finished)


def test_a_partial_directory_of_a_killed_run_is_replaced(tiny_llama, place):
    (place / ".out.partial").mkdir()
    (place / ".out.partial/model.safetensors").write_text("old")
    (place / ".out.partial/old.json").write_text("old")
    quantize(tiny_llama, place / "out")
    assert not (place / "out/old.json").exists()
    assert names(place) == ["out"]


class TestPlace:
    def test_an_existing_output_needs_overwrite(self, tiny_llama, place):
        quantize(tiny_llama, place / "out")
        with pytest.raises(OutputError, match="exists; pass --overwrite"):
            quantize(tiny_llama, place / "out")

    def test_overwrite_replaces_the_whole_directory(self, tiny_llama, place):
        quantize(tiny_llama, place / "out")
        (place / "out/extra").write_text("x")
        quantize(tiny_llama, place / "out", overwrite=True, bits=3)
        assert not (place / "out/extra").exists()
        assert json.loads((place / "out/qinit.json").read_text())["recipe"]["bits"] == 3
        assert names(place) == ["out"]

    def test_overwrite_does_not_touch_what_qinit_did_not_write(self, tiny_llama, place):
        (place / "thesis.tex").write_text("years of work")
        with pytest.raises(OutputError, match=r"has no qinit\.json, so qinit did not write it"):
            quantize(tiny_llama, place, overwrite=True)
        assert everything(place) == ["thesis.tex"]

    def test_a_file_is_not_replaced(self, tiny_llama, place):
        (place / "out").write_text("x")
        with pytest.raises(OutputError, match="is no directory"):
            quantize(tiny_llama, place / "out", overwrite=True)

    def test_an_empty_directory_is_taken(self, tiny_llama, place):
        (place / "out").mkdir()
        quantize(tiny_llama, place / "out")
        assert (place / "out/qinit.json").is_file()

    def test_what_a_link_points_to_is_replaced_and_the_link_stays(self, tiny_llama, place):
        quantize(tiny_llama, place / "real")
        (place / "link").symlink_to("real")
        quantize(tiny_llama, place / "link", overwrite=True, bits=3)
        assert names(place) == ["link", "real"]
        assert (place / "link").is_symlink()
        assert json.loads((place / "real/qinit.json").read_text())["recipe"]["bits"] == 3

    def test_missing_parents_are_made(self, tiny_llama, place):
        quantize(tiny_llama, place / "a/b/out")
        assert (place / "a/b/out/qinit.json").is_file()

    def test_below_a_file_nothing_can_be_written(self, tiny_llama, place):
        (place / "file").write_text("x")
        with pytest.raises(OutputError, match="cannot be written"):
            quantize(tiny_llama, place / "file/out")

    def test_a_name_that_no_file_system_takes_is_an_error(self, tiny_llama, place):
        with pytest.raises(OutputError, match=r"cannot be looked at .*too long"):
            quantize(tiny_llama, place / ("x" * 300))

    @pytest.mark.parametrize("where", [".", "..", "inner/out"])
    def test_the_source_is_never_written_to(self, tiny_llama, where):
        before = everything(tiny_llama.parent)
        with pytest.raises(OutputError, match="is, holds or lies in the source"):
            quantize(tiny_llama, tiny_llama / where, overwrite=True)
        assert everything(tiny_llama.parent) == before

    def test_too_little_space_is_seen_before_the_run(self, tiny_llama, place, monkeypatch):
        usage = namedtuple("usage", "total used free")(10**9, 10**9 - 1000, 1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(OutputError, match=r"needs 0\.00 GB, but only 0\.00 GB are free"):
            quantize(tiny_llama, place / "out")
        assert everything(place) == []

    def test_what_an_unfinished_run_has_written_counts_as_room(self, tiny_llama, place, monkeypatch):
        fail_at_layer(monkeypatch, 14, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            quantize(tiny_llama, place / "out", format="dense")
        monkeypatch.undo()
        usage = namedtuple("usage", "total used free")(10**9, 10**9 - 40_000, 40_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(OutputError, match="are free"):
            quantize(tiny_llama, place / "other", format="dense")
        quantize(tiny_llama, place / "out", format="dense")


class TestFailure:
    def test_a_failing_last_rename_puts_the_old_output_back_and_keeps_the_new_one(self, tiny_llama, place, monkeypatch):
        quantize(tiny_llama, place / "out")
        before = weights_of(place / "out")
        real = Path.rename

        def rename(self, target):
            if self.parent.name == ".out.partial":
                raise OSError(errno.EIO, "Input/output error")
            return real(self, target)

        monkeypatch.setattr(Path, "rename", rename)
        with pytest.raises(OutputError, match=r"Input/output error.*14 of 14 layers are kept"):
            quantize(tiny_llama, place / "out", overwrite=True, bits=3)
        assert names(place) == [".out.partial", "out"]
        assert weights_of(place / "out") == before
        monkeypatch.undo()
        quantize(tiny_llama, place / "out", overwrite=True, bits=3)
        assert names(place) == ["out"]
