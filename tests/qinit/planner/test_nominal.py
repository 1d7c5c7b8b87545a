import pytest

from qinit.planner import nominal
from qinit.planner.nominal import calibrating_seconds, check_tokens, checking_seconds, run_seconds, solving_seconds
from tests.helpers import plan_of
from tests.models import make_reader


@pytest.fixture
def plan(reader):
    return lambda **options: plan_of(reader, **{"calibration": "random", "calibration_length": 64, **options})


class TestCalibrating:
    def test_it_grows_with_the_tokens(self, plan):
        few, more = (calibrating_seconds(plan(), "text", count) for count in (640, 1280))
        assert 1.5 * few < more < 2 * few  # the pass back takes a part of the text only

    def test_only_own_text_is_written(self, plan):
        assert calibrating_seconds(plan(), "text", 64) == calibrating_seconds(plan(), "random", 64)
        assert calibrating_seconds(plan(), "self", 64) > calibrating_seconds(plan(), "text", 64)

    def test_one_pass_costs_less_than_the_walk(self, plan):
        parallel = calibrating_seconds(plan(calibration_mode="parallel"), "text", 640)
        assert parallel < calibrating_seconds(plan(), "text", 640)

    def test_samples_longer_than_the_model_takes_count_as_they_will_be(self, plan):
        longest, longer = (calibrating_seconds(plan(calibration_length=n), "self", 8) for n in (128, 4096))
        assert longest == longer

    def test_a_larger_model_costs_more(self, plan, tmp_path):
        larger = plan_of(make_reader(tmp_path / "larger", num_hidden_layers=4), calibration_length=64)
        assert calibrating_seconds(larger, "self", 64) > 1.5 * calibrating_seconds(plan(), "self", 64)


class TestRun:
    def test_it_is_solving_and_calibrating(self, plan):
        assert run_seconds(plan(calibration="none")) == solving_seconds(plan(), calibrated=False)
        text = plan(calibration_samples=32)
        assert run_seconds(text) == solving_seconds(text, calibrated=True) + calibrating_seconds(text, "random", 32)
        assert solving_seconds(text, calibrated=True) > solving_seconds(text, calibrated=False)

    def test_checking_grows_with_the_tokens(self, plan):
        assert checking_seconds(plan(), 2048) == pytest.approx(2 * checking_seconds(plan(), 1024))


def test_no_figure_depends_on_this_machine(plan, monkeypatch):
    before = run_seconds(plan(calibration="self"))
    monkeypatch.setattr("qinit.planner.operations.timed", lambda action, device: 1e3)
    monkeypatch.setattr("qinit.machine.free_memory", lambda device: 1)
    assert run_seconds(plan(calibration="self")) == before


def test_another_kind_of_device_has_another_speed(plan, monkeypatch):
    slow = checking_seconds(plan(), 1024)
    monkeypatch.setattr(nominal, "_kind", lambda plan: "cuda")
    assert checking_seconds(plan(), 1024) < slow / 10


class TestCheckTokens:
    def test_they_take_under_a_tenth_of_the_run_within_the_bounds(self, plan):
        sizes = [check_tokens(plan(calibration_samples=count)) for count in (1, 64, 4096)]
        assert sizes == sorted(sizes)
        assert sizes[0] == 2048
        assert sizes[-1] == 8192
        for count in (64, 4096):
            made = plan(calibration_samples=count)
            size = check_tokens(made)
            assert size == 2048 or checking_seconds(made, size) <= 0.1 * run_seconds(made)

    def test_a_run_without_calibration_is_soon_done(self, plan, monkeypatch):
        monkeypatch.setattr(nominal, "SOLVING", 0.0)
        assert check_tokens(plan(calibration="none")) == 1024
