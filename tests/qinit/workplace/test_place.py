import errno
import json
import os
import shutil
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path

import pytest

from qinit.errors import CheckpointError, HubError, OutputError
from qinit.events import Finished
from qinit.planner.memory import polish_disk_bytes
from qinit.workplace.place import check_space, partial_of, put_back, working
from tests.broken_off import PLAIN, TEXT, break_off, fail_at_layer, finish, start
from tests.helpers import everything, names, plan_of, quantize, weights_of
from tests.jobs import job_at, solved


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
        (place / "out/report.png").write_text("what `qinit report` makes")
        quantize(tiny_llama, place / "out", overwrite=True, bits=3)
        assert not (place / "out/report.png").exists()
        assert json.loads((place / "out/qinit.json").read_text())["recipe"]["bits"] == 3
        assert names(place) == ["out"]

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("checkpoint-10/notes.txt", "holds what qinit did not write and what would be lost: checkpoint-10/notes"),
            ("eqft_init/.hidden", "would be lost: eqft_init/.hidden; move it elsewhere"),
            ("eqft_init/adapter_model.safetensors", "was changed since qinit wrote it, so the adapter was trained"),
            ("SHA256SUMS", "what in .* is not qinit's own cannot be told, so it is not replaced"),
        ],
    )
    def test_overwrite_loses_nothing_that_a_person_put_there(self, tiny_llama, place, name, words):
        quantize(tiny_llama, place / "out")
        (place / "out" / name).parent.mkdir(exist_ok=True)
        (place / "out" / name).write_text("x")
        before = everything(place)
        with pytest.raises(OutputError, match=words):
            quantize(tiny_llama, place / "out", overwrite=True, bits=3)
        assert everything(place) == before
        assert (place / "out" / name).read_text() == "x"

    def test_what_is_put_there_during_the_run_stays_and_the_run_is_kept(self, tiny_llama, place, monkeypatch):
        quantize(tiny_llama, place / "out")
        note, sync = place / "out/note", "qinit.workplace.place._sync_tree"
        monkeypatch.setattr(sync, lambda _: note.write_text("x"))
        with pytest.raises(OutputError, match="would be lost: note; move it elsewhere"):
            quantize(tiny_llama, place / "out", overwrite=True, bits=3)
        assert note.read_text() == "x"
        monkeypatch.undo()
        note.unlink()
        quantize(tiny_llama, place / "out", overwrite=True, bits=3)
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


def test_an_unfinished_run_lies_beside_what_a_link_points_to(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk/out")
    assert partial_of(tmp_path / "out") == tmp_path / ".out.partial"
    assert partial_of(tmp_path / "link") == tmp_path / "disk/.out.partial"


def fail_after_a_layer(source, place, error):
    """Let a run end in an error when one of its two layers is finished."""
    plan = plan_of(source, iter=1, target_modules="k_proj")
    with job_at(plan, place / "out") as job:
        job.store.put(plan.layers[0], *solved(plan, plan.layers[0]))
        raise error


class TestWorking:
    def test_it_is_removed_at_the_end_and_its_scratch_is_empty_at_the_start(self, llama, place):
        with working(plan_of(llama), place / "out", "a test") as found:
            assert found.partial == place / ".out.partial"
            assert names(found.partial) == ["lock", "scratch"]
            (found.scratch / "states").write_bytes(b"x")
            found.run.mkdir()
        assert names(place) == []

    def test_clearing_removes_all_but_the_lock(self, llama, place):
        with working(plan_of(llama), place / "out", "a test") as found:
            found.run.mkdir()
            (found.run / "model.safetensors").write_bytes(b"x")
            (found.partial / "elsewhere").symlink_to(place.parent)
            found.journal.write_bytes(b"x")
            found.clear()
            assert names(found.partial) == ["lock", "scratch"]
        assert place.parent.is_dir()  # the link went, not what it points to

    @pytest.mark.parametrize(
        ("error", "left", "noted"),
        [
            (CheckpointError("bad weights"), [], False),  # the same command would end so again
            (HubError("no network"), [".out.partial"], True),
            (RuntimeError("boom"), [".out.partial"], True),
            (OutputError("no room"), [".out.partial"], False),  # its own message says what is kept
            (KeyboardInterrupt(), [".out.partial"], False),
        ],
    )
    def test_what_an_error_leaves(self, llama, place, error, left, noted):
        with pytest.raises(type(error)) as caught:
            fail_after_a_layer(llama, place, error)
        assert names(place) == left
        words = "1 of 2 layers are kept, the same command goes on from there"
        assert getattr(caught.value, "__notes__", []) == ([words] if noted else [])

    def test_an_input_that_could_not_be_read_just_then_is_no_bad_input(self, llama, place):
        error = CheckpointError("cannot be read")
        error.__cause__ = OSError(errno.EIO, "Input/output error")
        with pytest.raises(CheckpointError):
            fail_after_a_layer(llama, place, error)
        assert names(place) == [".out.partial"]


def test_the_result_is_on_the_disk_before_it_has_its_name(llama, place, monkeypatch):
    synced, order = [], []
    real_sync, real_rename = os.fsync, Path.rename

    def sync(descriptor):
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        return real_sync(descriptor)

    def rename(path, target):
        order.append((path, set(synced)))
        return real_rename(path, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    quantize(llama, place / "out")
    (path, before), run = order[-1], str(place / ".out.partial/run")
    assert str(path) == run
    written = {f"{run}/{file.relative_to(place / 'out')}" for file in (place / "out").rglob("*")}
    assert {run, *written} <= before
    assert synced[-1] == str(place)  # and so is its name


def test_room_is_needed_for_base_adapter_companions_and_a_second_adapter_of_a_polish(llama, place, monkeypatch):
    plan = plan_of(llama)
    companions, polished = plan.checkpoint.companion_bytes(), {"calibration": "random", "polish": 1}
    lessons = polish_disk_bytes(plan_of(llama, **polished))
    assert companions > 0
    for options, needed in (
        ({}, plan.base_bytes + plan.adapter_bytes + companions),
        (
            polished,
            plan.base_bytes + 2 * plan.adapter_bytes + companions + lessons,
        ),
    ):
        for free, refused in ((needed, False), (needed - 1, True)):
            usage = namedtuple("usage", "total used free")(10**9, 0, free)
            monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
            with pytest.raises(OutputError, match="are free there") if refused else nullcontext():
                check_space(plan_of(llama, **options), place / "out")


@pytest.mark.parametrize("what", ["--out", "model"])
def test_names_that_are_not_utf_8_are_found_before_the_first_weight_is_read(what, llama, place, monkeypatch):
    monkeypatch.setattr("qinit.files.tensors.StoredTensor.read", None)
    name = os.fsdecode(b"caf\xe9")
    source = Path(shutil.copytree(llama, place / (name if what == "model" else "m")))
    with pytest.raises(OutputError, match=rf"{what} is '.*caf\\udce9.*', which is not UTF-8") as caught:
        quantize(source, place / ("out" if what == "model" else name) / "run")
    assert "give it another name" in str(caught.value)


class TestPutBack:
    def test_a_run_that_was_put_aside_comes_back(self, place):
        (place / ".out.replaced").mkdir()
        (place / ".out.replaced/qinit.json").write_text("{}")
        put_back(place / "out")
        assert everything(place) == ["out", "out/qinit.json"]

    def test_one_that_has_its_place_stays(self, place):
        for name in ("out", ".out.replaced"):
            (place / name).mkdir()
        put_back(place / "out")
        put_back(place / "other")
        assert names(place) == [".out.replaced", "out"]

    def test_what_cannot_be_put_back_is_named(self, place, monkeypatch):
        (place / ".out.replaced").mkdir()

        def refuse(*_):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "rename", refuse)
        with pytest.raises(OutputError, match=r"cannot be put back \(Permission denied\)"):
            put_back(place / "out")
