import pytest

from qinit.workplace.place import kept
from tests.broken_off import RUNS, Crash, finish, result_in, undisturbed


def test_sensitivities_are_not_measured_again(strong_llama, place, monkeypatch):
    options = RUNS["mixed"]
    wanted = undisturbed(strong_llama, place, **options)

    def crash(*_, **__):
        raise Crash

    with monkeypatch.context() as context:
        context.setattr("qinit.runner.job.Store", crash)
        with pytest.raises(Crash):
            finish(strong_llama, place / "out", **options)
    assert kept(place / "out").startswith("the measured sensitivities are kept")
    monkeypatch.setattr("qinit.widths.fisher.measure", crash)
    finish(strong_llama, place / "out", **options)
    assert result_in(place / "out") == wanted
