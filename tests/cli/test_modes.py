import os
import stat
import tempfile
from pathlib import Path

import pytest

from qinit.runner import layer as layer_module

CALIBRATED = ("--calibration", "random", "--calibration-samples", 4, "--calibration-length", 16)
QUICK = ("--rank", 4, "--iter", 1, "--max-shard-size", "60KB", "--out", "place/out")
RUNS = {
    "eqft": ("eqft", *QUICK, *CALIBRATED, "--format", "dense"),
    "meqft": ("meqft", *QUICK, *CALIBRATED, "--format", "dense", "--ratio", 0.5),
}


@pytest.fixture
def masked():
    """Return a function that sets the umask; it is put back."""
    before = os.umask(0)
    os.umask(before)
    yield os.umask
    os.umask(before)


@pytest.fixture
def temporary(monkeypatch, tmp_path):
    """Return what temporary directories were made, and where those go that are told no place."""
    made, make = [], tempfile.mkdtemp

    def record(*arguments, **options):
        made.append(Path(make(*arguments, **options)))
        return str(made[-1])

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(tempfile, "mkdtemp", record)
    return made, tmp_path / "elsewhere"


def modes(directory):
    """Return the permission bits of everything below, as sets: those of files and those of directories."""
    found = {True: set(), False: set()}
    for path in directory.rglob("*"):
        found[path.is_dir()].add(stat.S_IMODE(path.stat().st_mode))
    return found[False], found[True]


@pytest.mark.parametrize("umask", [0o077, 0o002])
def test_all_that_a_run_writes_has_the_users_umask(command, tiny_llama, masked, umask, monkeypatch, temporary):
    during, solve = [], layer_module.solve

    def look(*arguments):
        during.append(modes(Path("place")))
        return solve(*arguments)

    monkeypatch.setattr(layer_module, "solve", look)
    (tiny_llama / "chat_template.jinja").write_text("x")
    (tiny_llama / "chat_template.jinja").chmod(0o400)  # the source's own mode is not taken over
    masked(umask)
    assert command(*RUNS["eqft"][:1], tiny_llama, *RUNS["eqft"][1:])[0] == 0
    assert command("report", "place/out", "--json")[0] == 0
    files, directories = {0o666 & ~umask}, {0o777 & ~umask}
    assert modes(Path("place")) == (files, directories)
    assert len(list(Path("place/out").glob("*.safetensors"))) > 2
    assert {"report.png", "chat_template.jinja", "qinit.json"} <= {path.name for path in Path("place/out").iterdir()}
    assert during
    for written, places in during:  # a temporary directory may be the owner's alone
        assert written <= files
        assert places <= {*directories, 0o700}


@pytest.mark.parametrize("name", RUNS)
def test_temporary_files_lie_beside_their_target_and_none_is_left(command, tiny_llama, temporary, name):
    made, elsewhere = temporary
    assert command(RUNS[name][0], tiny_llama, *RUNS[name][1:])[0] == 0
    place = Path("place").resolve()
    assert made
    assert all(place in path.resolve().parents for path in made)
    assert [path.name for path in place.iterdir()] == ["out"]
    assert not [path for path in place.rglob("*") if path.name.startswith((".", "tmp"))]
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("name", RUNS)
def test_after_a_failure_no_temporary_file_is_left_either(command, tiny_llama, temporary, name, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    made, elsewhere = temporary
    monkeypatch.setattr(layer_module, "solve", fail)
    code, _, err = command(RUNS[name][0], tiny_llama, *RUNS[name][1:])
    assert (code, err.count("\n")) == (2, 1)
    assert made
    assert not [path for path in made if path.exists()]
    assert list(elsewhere.iterdir()) == []
    assert not Path("place/out").exists()
