import errno
import os
import subprocess

import pytest

from qinit.errors import OutputError
from qinit.events import Done, Resumed
from qinit.files.writer import SafetensorsWriter
from tests.broken_off import RANDOM, RUNS, finish, result_in, start, undisturbed
from tests.helpers import names


class TestFullDisk:
    @pytest.mark.parametrize("number", [3, 30])
    def test_it_is_one_error_and_the_run_goes_on_when_there_is_space(self, strong_llama, place, monkeypatch, number):
        wanted = undisturbed(strong_llama, place, **RANDOM)
        real, calls = SafetensorsWriter.write_chunks, iter(range(1000))

        def write(self, *arguments):
            if next(calls) >= number:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(self, *arguments)

        with monkeypatch.context() as context:
            context.setattr(SafetensorsWriter, "write_chunks", write)
            with pytest.raises(OutputError) as caught:
                finish(strong_llama, place / "out", **RANDOM)
        layers = (number - 1) // 6  # the text, then six tensors for each
        left = f"{layers} of 14 layers are kept, the same command goes on from there" if layers else "nothing was left"
        assert f"cannot be written (No space left on device); {left}" in str(caught.value)
        assert "GB free and the run needs 0.00 GB more: make space and start again" in str(caught.value)
        finish(strong_llama, place / "out", **RANDOM)
        assert result_in(place / "out") == wanted

    def test_a_journal_that_cannot_be_written_on_is_the_same(self, strong_llama, place, monkeypatch):
        wanted = undisturbed(strong_llama, place, **RANDOM)
        real, calls = os.write, iter(range(1000))

        def write(descriptor, data):
            if next(calls) == 7:
                real(descriptor, bytes(data)[:50])
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(descriptor, data)

        with monkeypatch.context() as context:
            context.setattr("qinit.workplace.journal.os.write", write)
            with pytest.raises(OutputError, match="6 of 14 layers are kept"):
                finish(strong_llama, place / "out", **RANDOM)
        finish(strong_llama, place / "out", **RANDOM)
        assert result_in(place / "out") == wanted

    @pytest.mark.parametrize("kind", ["sequential", "data-free"])
    def test_a_real_one(self, strong_llama, place, kind):
        mount = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2M", "tmpfs", place], capture_output=True, text=True, check=False
        )
        if mount.returncode:
            pytest.skip(f"a small disk cannot be mounted here, which needs root ({mount.stderr.strip()})")
        try:
            wanted = undisturbed(strong_llama, place, **RUNS[kind])
            with pytest.raises(OutputError) as caught:
                self.filled_up(place / "filler", start(strong_llama, place / "out", **RUNS[kind]))
            assert "No space left on device" in str(caught.value)
            assert " of 14 layers are kept, the same command goes on from there" in str(caught.value)
            assert f"the disk at {place} has 0.00 GB free" in str(caught.value)
            assert names(place) == [".out.partial", "filler"]
            (place / "filler").unlink()
            assert isinstance(finish(strong_llama, place / "out", **RUNS[kind])[0], Resumed)
            assert result_in(place / "out") == wanted
        finally:
            subprocess.run(["umount", place], check=True)

    def filled_up(self, file, events):
        for event in events:
            if isinstance(event, Done) and event.name == "model.layers.1.mlp.down_proj.weight":
                with file.open("wb", buffering=0) as handle:
                    free = os.statvfs(file.parent).f_bavail
                    assert handle.write(bytes(4096 * free)) == 4096 * free
