import pytest

from qinit.compare import workers
from qinit.compare.schedule import Schedule
from qinit.compare.workers import Begun, Ended, Stepped, carry_out
from qinit.errors import CompareError, OutputError
from tests.qinit.compare.comparisons import comparison, found_for


@pytest.fixture
def schedule(tmp_path):
    return Schedule(comparison(out=tmp_path))


def carried_out(schedule, work, monkeypatch):
    """Return the events of a comparison whose cells are worked on by `work`."""
    events = []
    monkeypatch.setattr(workers, "work", work)
    carry_out(schedule, events.append)
    return events


class TestCarryOut:
    def test_every_cell_begins_and_ends_once(self, schedule, monkeypatch):
        whole = found_for(schedule.comparison)
        events = carried_out(schedule, lambda made, cell, progress: whole[cell], monkeypatch)
        begun = [event.cell for event in events if isinstance(event, Begun)]
        assert begun == [event.cell for event in events if isinstance(event, Ended)]
        assert len(begun) == len(set(begun)) == schedule.comparison.cells
        assert schedule.found == {cell: whole[cell] for cell in begun}

    @pytest.mark.parametrize(
        ("error", "said"), [(CompareError("no text"), "no text"), (MemoryError("no\nroom"), "MemoryError: no room")]
    )
    def test_a_cell_that_fails_ends_its_row_alone(self, schedule, monkeypatch, error, said):
        whole = found_for(schedule.comparison)
        broken = schedule.comparison.rows[1]

        def work(made, cell, progress):
            if cell.row == broken:
                raise error
            return whole[cell]

        carried_out(schedule, work, monkeypatch)
        assert [found for cell, found in schedule.found.items() if cell.row == broken] == [{"failed": said}]
        assert all("failed" not in found for cell, found in schedule.found.items() if cell.row != broken)

    def test_results_that_cannot_be_written_stop_it(self, schedule, monkeypatch):
        def work(made, cell, progress):
            raise OutputError("the disk is full")

        with pytest.raises(OutputError, match="disk is full"):
            carried_out(schedule, work, monkeypatch)

    def test_steps_are_told_now_and_then(self, schedule, monkeypatch):
        whole = found_for(schedule.comparison)
        clock = iter(number * 0.4 for number in range(10_000))
        monkeypatch.setattr(workers.time, "monotonic", lambda: next(clock))

        def work(made, cell, progress):
            for step in range(9):
                progress(step, 1.0)
            return whole[cell]

        steps = [event.step for event in carried_out(schedule, work, monkeypatch) if isinstance(event, Stepped)]
        assert 0 < len(steps) < 9 * schedule.comparison.cells
