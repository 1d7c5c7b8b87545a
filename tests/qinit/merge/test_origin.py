import shutil

import pytest

from qinit.errors import CheckpointError, ReportError
from qinit.merge.origin import origin_of
from qinit.trial.fitting import BASE_KEY


@pytest.fixture
def adapters(tmp_path):
    """Return a function that gives adapters which name these bases."""
    return lambda *named: {tmp_path / str(at): {BASE_KEY: name} for at, name in enumerate(named)}


def test_the_base_that_they_name_is_found_and_its_start(finished, adapters):
    for run in (None, finished):
        found = origin_of(adapters(str(finished), str(finished)), run)
        assert (found.base, found.start, found.name, found.notes) == (
            *(finished, finished / "eqft_init", str(finished)),
            (),
        )


def test_a_copy_of_the_base_is_the_base_and_what_is_not_here_is_noted(finished, adapters, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "copy")
    (copy / "SHA256SUMS").unlink()  # the sums are of the files then
    assert origin_of(adapters(str(finished), str(copy)), None).notes == ()
    found = origin_of(adapters("/gone/elsewhere", str(finished)), None)
    assert found.base == finished
    assert "names the base '/gone/elsewhere', which is not here" in found.notes[0]


def test_the_adapter_that_qinit_made_for_a_base_is_a_start_too(finished, adapters, tmp_path):
    repair = shutil.copytree(finished / "eqft_init", tmp_path / "repair")
    shutil.copy(finished / "qinit.json", repair)
    base = shutil.copytree(finished, tmp_path / "base")
    shutil.rmtree(base / "eqft_init")
    (base / "qinit.json").unlink()
    found = origin_of(adapters(str(base), str(base)), repair)
    assert (found.start, found.base.resolve()) == (repair, finished.resolve())
    (note,) = origin_of(adapters(str(base), str(base)), None).notes
    assert "holds no start of qinit's: all that the adapters hold is taken for what training added" in note


def test_what_cannot_be_found(finished, adapters, tmp_path):
    with pytest.raises(CheckpointError, match="names no base under base_model_name_or_path; give the run"):
        origin_of(adapters(None, ""), None)
    with pytest.raises(CheckpointError, match=r"/gone/run: no such directory, .*; give the run that the adapters were"):
        origin_of(adapters("/gone/run", "/gone/run"), None)
    with pytest.raises(CheckpointError, match=r"gone/run: .*; give the run that the adapters were trained on"):
        origin_of(adapters("gone/run", "gone/run"), None)
    with pytest.raises(ReportError, match="gone: no such directory"):
        origin_of(adapters(str(finished)), tmp_path / "gone")
    copy = shutil.copytree(finished, tmp_path / "copy")
    shutil.rmtree(copy / "eqft_init")
    with pytest.raises(ReportError, match="copy: has no eqft_init, so what training added"):
        origin_of(adapters(str(finished)), copy)
