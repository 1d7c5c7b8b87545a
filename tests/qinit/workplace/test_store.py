import shutil

import pytest

from qinit.events import Done
from qinit.files.tensors import read_header
from qinit.workplace.place import partial_of
from tests.broken_off import RANDOM, RUNS, break_off, finish, result_in, undisturbed


def test_bytes_that_are_not_those_of_the_journal_are_made_again(strong_llama, place):
    options = RUNS["sequential"]
    wanted = undisturbed(strong_llama, place, **options)
    break_off(strong_llama, place / "out", 9, **options)
    file = partial_of(place / "out") / "run/model.safetensors"
    place_of = read_header(file)["model.layers.0.mlp.up_proj.scales"].offset
    raw = bytearray(file.read_bytes())
    raw[place_of] ^= 1
    file.write_bytes(raw)
    done = [event for event in finish(strong_llama, place / "out", **options) if isinstance(event, Done) and event.row]
    assert len(done) == 6  # five were left, one was damaged
    assert result_in(place / "out") == wanted


@pytest.mark.parametrize("gone", ["run/model.safetensors", "run/eqft_init/adapter_model.safetensors", "run", "."])
def test_files_that_are_gone_are_made_again(strong_llama, place, gone):
    wanted = undisturbed(strong_llama, place, **RANDOM)
    break_off(strong_llama, place / "out", 9, **RANDOM)
    path = partial_of(place / "out") / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    finish(strong_llama, place / "out", **RANDOM)
    assert result_in(place / "out") == wanted
