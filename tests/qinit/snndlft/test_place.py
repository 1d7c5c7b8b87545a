import pytest

from qinit.errors import OutputError, QinitError
from qinit.snndlft.place import kept, sum_of, working
from qinit.workplace.place import require_replaceable
from tests.helpers import names


def test_an_unfinished_training_is_gone_on_with_if_it_was_asked_the_same(tmp_path):
    out = tmp_path / "out"

    def broken_off(asked):
        def work():
            with working(out, asked, "") as place:
                found.append((place.differs, place.last))
                (place.checkpoints / "checkpoint-5").mkdir(parents=True, exist_ok=True)
                raise QinitError("ended")

        with pytest.raises(QinitError, match="ended") as error:
            work()
        assert error.value.__notes__ == ["checkpoint-5 is kept, the same command goes on from there"] == [kept(out)]

    found = []
    for asked in ({"steps": 9}, {"steps": 9}, {"steps": 8}):
        broken_off(asked)
    assert [(differs, last is not None) for differs, last in found] == [(None, False), (None, True), ("steps", False)]
    with working(out, {"steps": 8}, "") as place:
        place.run.mkdir()
        (place.run / "qinit.json").write_text("{}")
        place.finish()
    assert names(tmp_path) == ["out"]


def test_without_a_checkpoint_nothing_is_left(tmp_path):
    with pytest.raises(KeyboardInterrupt), working(tmp_path / "out", {}, ""):
        raise KeyboardInterrupt
    assert names(tmp_path) == []
    assert kept(tmp_path / "out") == ""


def test_what_is_there_is_not_replaced_unasked(tmp_path):
    (tmp_path / "file").write_text("a")
    assert sum_of(tmp_path / "file") == "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    require_replaceable(tmp_path / "new", False)
    for out, overwrite, words in (
        (tmp_path / "file", True, "is no directory"),
        (tmp_path, False, "pass --overwrite"),
        (tmp_path, True, "qinit did not write it"),
    ):
        with pytest.raises(OutputError, match=words):
            require_replaceable(out, overwrite)
