import pytest

from qinit.clock import OTHER, Clock, counted, section
from qinit.events import Done, Finished
from qinit.runner.run import run
from tests.helpers import calibrated_plan, plan_of, weights_of
from tests.models import make_reader


class Time:
    """A timer that only moves when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds

    def fails(self, seconds):
        self.passes(seconds)
        raise KeyError


@pytest.fixture
def time():
    return Time()


def test_a_section_within_another_is_not_counted_twice(time):
    with Clock(time) as clock:
        time.passes(1)
        with section("outer"):
            time.passes(2)
            with section("inner"):
                time.passes(4)
            time.passes(8)
        time.passes(16)
    assert clock.split() == {OTHER: 17, "outer": 10, "inner": 4}
    assert list(clock.split()) == [OTHER, "outer", "inner"]  # the longest first
    assert sum(clock.split().values()) == 31


def test_the_same_section_adds_up_and_an_error_ends_it(time):
    with Clock(time) as clock:
        for seconds in (1, 2):
            with pytest.raises(KeyError), section("a"):
                time.fails(seconds)
        time.passes(5)
    assert clock.split() == {OTHER: 5, "a": 3}


def test_a_function_can_be_a_section(time):
    @counted("solving")
    def solve(seconds):
        """Solve."""
        time.passes(seconds)
        return 7

    assert solve(1) == 7  # no clock runs
    with Clock(time) as clock:
        assert solve(seconds=3) == 7
    assert clock.split() == {"solving": 3, OTHER: 0}
    assert solve.__doc__ == "Solve."


def test_without_a_clock_nothing_is_made():
    assert section("a") is section("b")
    with Clock() as clock:
        assert section("a") is not section("b")
    assert section("a") is section("b")
    before = clock.split()
    with section("a"):
        pass
    assert clock.split() == before


def test_a_generator_that_is_closed_leaves_its_section(time):
    def steps():
        with section("a"):
            time.passes(1)
            yield
            time.passes(100)

    with Clock(time) as clock:
        started = steps()
        next(started)
        started.close()
        time.passes(2)
    assert clock.split() == {OTHER: 2, "a": 1}


def test_the_clock_before_goes_on(time):
    with Clock(time) as outer:
        with Clock(time) as inner, section("a"):
            time.passes(1)
        with section("b"):
            time.passes(2)
    assert inner.split() == {"a": 1, OTHER: 0}
    assert outer.split() == {"b": 2, OTHER: 1}


def test_a_run_is_split_into_all_that_it_does_and_writes_the_same(tmp_path):
    options = {"calibration": "self", "calibration_samples": 4, "calibration_length": 16, "iter": 1}
    plan = calibrated_plan(make_reader(tmp_path / "model"), **options, polish=1, check=True)
    *_, plain = run(plan, tmp_path / "plain")
    with Clock() as clock:
        *_, timed = run(plan, tmp_path / "timed")
    assert isinstance(plain, Finished)
    parts = {"text", "forward", "statistics", "pass back", "solving", "reading", "writing", "polish", "check", OTHER}
    assert clock.split().keys() == parts
    assert min(clock.split().values()) > 0
    assert sum(clock.split().values()) >= timed.report.totals["seconds"]
    assert weights_of(tmp_path / "plain") == weights_of(tmp_path / "timed")


def test_widths_that_are_measured_are_a_section(tiny_llama, tmp_path):
    plan = plan_of(tiny_llama, ratio=0.5, iter=1)
    with Clock() as clock:
        events = list(run(plan, tmp_path / "out"))
    assert any(isinstance(event, Done) for event in events)
    assert clock.split()["sensitivity"] > 0
