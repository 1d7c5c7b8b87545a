"""Children that answer, crash, hang and print."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from qinit.doctor.examine import Row, Trying, examine

ROOT = Path(__file__).parents[3]


@pytest.fixture
def events(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HANGING", str(tmp_path / "pid"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return list(examine("tests.qinit.doctor.odd_probes", limit=4))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_every_end_of_a_probe_is_a_row_and_none_is_the_end(events, tmp_path):
    rows = {event.name: event for event in events if isinstance(event, Row)}
    assert {name: (row.state, row.detail) for name, row in rows.items()} == {
        "needs": ("absent", "no-such-package not installed"),
        "prints": ("works", "in an empty directory"),
        "raises": ("fails", "ValueError: one two"),
        "crashes": ("fails", "its process was ended by SIGSEGV"),
        "refuses": ("fails", "bits: 5"),
        "exits": ("fails", "its process ended with 7: engine: out of luck"),
        "hangs": ("fails", "no answer within 4 s"),
        "nothing": ("absent", "no such device"),
    }
    assert rows["needs"].pip == 'pip install "no-such-package"'
    assert {row.pip for name, row in rows.items() if name != "needs"} == {""}
    assert [row.name for row in rows.values() if row.core] == ["prints"]
    tried = [event.title for event in events if isinstance(event, Trying)]
    assert tried == ["prints", "raises", "crashes", "refuses", "exits", "hangs", "nothing"]
    # What a hanging engine had started is gone, and so is the temporary directory.
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not alive(child):
            break
        time.sleep(0.05)
    assert not alive(child)
    assert [path.name for path in tmp_path.iterdir()] == ["pid"]


def test_no_other_child_is_started_when_it_took_too_long(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    rows = [event for event in examine("tests.qinit.doctor.odd_probes", total=0) if isinstance(event, Row)]
    left = [row.name for row in rows if row.detail.startswith("not tried, as the others took ")]
    assert left == ["refuses", "exits", "hangs", "nothing"]
    assert len(rows) == 8


def test_who_stops_listening_ends_the_child(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    events = examine("tests.qinit.doctor.odd_probes")
    assert next(event for event in events if isinstance(event, Row) and event.name == "prints").state == "works"
    events.close()
    assert list(tmp_path.iterdir()) == []
    assert os.environ["PYTHONPATH"] == str(ROOT)
