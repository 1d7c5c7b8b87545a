from collections import defaultdict
from dataclasses import asdict

import pytest
import torch

from qinit.planner import operations
from qinit.planner import time as module
from qinit.planner.operations import OPERATIONS, Machine
from qinit.planner.time import WORDS, Estimate, busiest, estimate, expected, expected_polish, in_words
from qinit.planner.work import work_of
from qinit.solver.methods import METHODS
from qinit.text.self_text import LARGEST_BATCH
from tests.helpers import plan_of
from tests.models import FAMILIES, make_checkpoint, make_reader

CPU = torch.device("cpu")
TEXT = {"calibration": "random", "calibration_samples": 64, "calibration_length": 64, "format": "dense"}


@pytest.fixture
def one_second(monkeypatch):
    """Every call takes a second, and so does every solve."""
    monkeypatch.setattr(operations, "timed", lambda action, device: 1.0)
    monkeypatch.setattr(Machine, "sharpen", lambda machine: None)


@pytest.fixture
def plan(tiny_llama):
    return lambda **options: plan_of(tiny_llama, **{**TEXT, **options})


class TestEstimate:
    def test_without_calibration_the_time_is_the_solver_s_and_the_disk_s(self, plan, one_second):
        found = estimate(plan(calibration="none"), CPU)
        assert {name for name, value in asdict(found).items() if value} == {"solving", "writing"}
        assert found.solving == 14  # layers
        assert found.total == found.solving + found.writing

    def test_a_call_of_a_second_counts_as_often_as_it_is_made(self, plan, one_second):
        made, machine = plan(polish=5, check=True), Machine(CPU)
        found = estimate(made, CPU, machine)
        expected = defaultdict(float)
        for work in work_of(made, CPU):
            expected[work.part] += machine.seconds(work.operation, work.shape, work.count)
        for part in ("calibrating", "polishing"):
            assert getattr(found, part) == pytest.approx(expected[part])
        assert found.checking == pytest.approx(expected["checking"] + module.STARTING)

    def test_a_machine_that_has_measured_measures_nothing_again(self, plan, monkeypatch):
        calls = []
        monkeypatch.setattr(operations, "timed", lambda action, device: calls.append(action) or 1.0)
        monkeypatch.setattr(Machine, "sharpen", lambda machine: None)
        machine = Machine(CPU)
        first = estimate(plan(), CPU, machine)
        count = len(calls)
        assert estimate(plan(), CPU, machine) == first
        assert len(calls) == count

    def test_the_operations_of_a_plan_with_many_shapes_are_few(self, tmp_path, monkeypatch, one_second):
        calls = []
        monkeypatch.setattr(operations, "timed", lambda action, device: calls.append(action) or 1.0)
        wide = make_checkpoint(tmp_path / "m", intermediate_size=224, num_key_value_heads=1, vocab_size=512)
        options = {**TEXT, "calibration": "self", "polish": 3, "ratio": 0.5, "check": True}
        estimate(plan_of(wide, **options), CPU)
        assert len(calls) <= (len(OPERATIONS) + 1) * operations.MOST_SHAPES

    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_family_can_be_estimated(self, tmp_path, family, one_second):
        found = estimate(plan_of(make_checkpoint(tmp_path / family, family), **TEXT, check=True), CPU)
        assert min(found.calibrating, found.solving, found.checking) > 0

    @pytest.mark.parametrize("family", ["bert", "t5", "gpt_neox"])
    def test_other_models_can_too(self, tmp_path, family, one_second):
        assert estimate(plan_of(make_checkpoint(tmp_path / family, family), **TEXT), CPU).calibrating > 0

    @pytest.mark.parametrize("method", [name for name in METHODS if name != "eqft"])
    def test_every_method_can_be_estimated(self, plan, one_second, method):
        calibrated = bool(METHODS[method].needs)
        assert estimate(plan(method=method, calibration="random" if calibrated else "none"), CPU).solving > 0

    def test_it_measures_for_some_two_seconds_at_most(self, plan, monkeypatch):
        monkeypatch.setattr(operations, "LEAST_SECONDS", 0.001)
        monkeypatch.setattr(operations, "MOST_SECONDS", 0.1)
        machine = Machine(CPU)
        assert estimate(plan(), CPU, machine).total > 0
        assert machine.spent >= 0.1

    def test_a_larger_model_takes_longer(self, tmp_path, one_second):
        small, large = (plan_of(make_reader(tmp_path / str(n), num_hidden_layers=n), **TEXT, polish=2) for n in (2, 4))
        less, more = (asdict(estimate(each, CPU)) for each in (small, large))
        assert all(more[part] > 1.3 * less[part] for part in ("calibrating", "solving", "polishing"))


class TestProcesses:
    def test_the_largest_piece_goes_to_the_one_with_the_least(self):
        assert busiest([3, 1, 2, 4], 2) == 5
        assert busiest([3, 1, 2, 4], 1) == 10
        assert busiest([3, 1], 4) == 3

    def test_without_data_layers_are_dealt_out(self, plan, one_second):
        made = plan(calibration="none")
        assert [estimate(made, CPU, None, count).solving for count in (1, 2, 4, 14)] == [14, 7, 4, 1]
        assert estimate(made, CPU, None, 2).writing == estimate(made, CPU).writing

    def test_with_calibration_layers_that_read_the_same_are(self, plan, one_second):
        made = plan()
        one, two, three, eight, many = (estimate(made, CPU, None, count) for count in (1, 2, 3, 8, 14))
        assert [one.solving, two.solving, three.solving] == [14, 2 * (2 + 1 + 1 + 1), 2 * (1 + 1 + 1 + 1)]
        assert two.calibrating == pytest.approx(one.calibrating / 2)
        assert three.calibrating == pytest.approx(one.calibrating * 3 / 8)  # three of eight shards
        assert many.calibrating == eight.calibrating == pytest.approx(one.calibrating / 8)

    def test_each_writes_its_part_of_the_text(self, plan, one_second):
        made = plan(calibration="self", calibration_samples=4 * LARGEST_BATCH["cpu"])
        one, four = (estimate(made, CPU, None, count).text for count in (1, 4))
        assert four == pytest.approx(one / 4)


class TestWords:
    def test_parts_of_a_second_and_more_are_named(self):
        found = Estimate(text=30, calibrating=300, solving=0.4)
        assert in_words(found) == "about 5.5 min here (30 s to write the text, 5 min to measure the layers on it)"

    def test_of_a_short_run_the_longest_part_is_named(self):
        assert in_words(Estimate(solving=0.4, writing=0.1)) == "about 1 s here (1 s to solve)"

    def test_every_part_has_its_words(self):
        assert WORDS.keys() == asdict(Estimate()).keys()

    def test_nothing_is_said_before_a_run_without_calibration(self, plan):
        assert expected(plan(calibration="none"), CPU) == ()

    def test_a_polish_of_a_finished_run_is_its_text_its_steps_and_its_check(self, plan, one_second):
        whole = expected(plan(calibration="random", polish=50), CPU)[0]
        found = expected_polish(plan(calibration="random", polish=50), CPU)
        assert found.startswith("this polish takes about ")
        assert "to polish" in found
        assert "to solve" in whole
        assert "to solve" not in found
        assert "to write the text" not in found
        assert "to write the text" in expected_polish(plan(calibration="self", polish=50), CPU)
