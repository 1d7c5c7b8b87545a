import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qinit.workplace.journal import SHAPES, Journal, finished_layers, kept_words, read_journal
from qinit.workplace.place import partial_of
from tests.broken_off import RANDOM, break_off, finish

HEADER = {
    "since": "2026-01-02T03:04:05+00:00",
    "layers": 9,
    "signature": {},
    "processor": "x",
    "calibration_reason": "",
}
patient = settings(deadline=None)  # they wait for the disk
words = st.text(max_size=20)
places = st.integers(0, 10**6)
records = st.lists(
    st.one_of(
        st.builds(lambda text: {"kind": "note", "text": text}, words),
        st.builds(lambda name, total: {"kind": "copied", "name": name, "sums": [total]}, words, st.integers()),
        st.builds(
            lambda name, error: {"kind": "layer", "row": {"name": name, "error": error}, "sums": []},
            words,
            st.floats(allow_nan=False),
        ),
    ),
    max_size=6,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("journals") / "journal"


def written(file, records):
    """Write a journal; returns its bytes and what reading it gives."""
    journal = Journal.create(file, HEADER)
    for record in records:
        journal.append(dict(record), sync=False)
    journal.close()
    return file.read_bytes(), read_journal(file)


def again(file, data):
    file.write_bytes(data)
    return read_journal(file)


@patient
@given(records)
def test_what_was_appended_is_read(file, records):
    _, found = written(file, records)
    assert found[0] == {"kind": "start", "format": 1, **HEADER}
    plain = [{key: record[key] for key in record if key not in ("seconds", "peak_memory_bytes")} for record in found]
    assert plain[1:] == records
    assert all(record["seconds"] >= 0 for record in found[1:])


@patient
@given(records, places)
def test_what_is_torn_reads_as_what_was_before_it(file, records, place):
    whole, found = written(file, records)
    size = place % (len(whole) + 1)
    assert again(file, whole[:size]) == found[: whole[:size].count(b"\n")]


@patient
@given(records, places, st.integers(1, 255))
def test_a_changed_byte_ends_the_reading_there(file, records, place, change):
    whole, found = written(file, records)
    at = place % len(whole)
    assert again(file, whole[:at] + bytes([whole[at] ^ change]) + whole[at + 1 :]) == found[: whole[:at].count(b"\n")]


@patient
@given(records, st.data())
def test_lines_left_out_doubled_or_swapped_are_not_believed(file, records, data):
    whole, found = written(file, records)
    lines = whole.splitlines(keepends=True)
    picked = data.draw(st.lists(st.sampled_from(range(len(lines))), max_size=8))
    same = next((i for i, number in enumerate(picked) if number != i), len(picked))
    assert again(file, b"".join(lines[number] for number in picked)) == found[:same]


@patient
@given(st.binary(max_size=300))
def test_anything_else_is_no_journal(file, data):
    assert again(file, data) == []
    assert Journal.open(file) is None


def test_lines_of_another_journal_do_not_fit(file):
    one, _ = written(file, [{"kind": "note", "text": "a"}])
    other, _ = written(file, [{"kind": "note", "text": "b"}, {"kind": "note", "text": "c"}])
    assert len(again(file, one + other.splitlines(keepends=True)[2])) == 2


@patient
@given(records, places)
def test_a_torn_journal_is_gone_on_with(file, records, place):
    whole, found = written(file, records)
    first = whole.index(b"\n") + 1
    size = first + place % (len(whole) + 1 - first)
    file.write_bytes(whole[:size])
    journal = Journal.open(file)
    before = list(journal.records)
    journal.append({"kind": "note", "text": "on"})
    journal.close()
    assert before == found[1 : whole[:size].count(b"\n")]
    assert [record.get("text") for record in read_journal(file)][-1] == "on"
    assert len(read_journal(file)) == len(before) + 2


@pytest.mark.parametrize(
    "record",
    [
        *({"kind": "layer"}, {"kind": "layer", "row": [], "sums": []}, {"kind": "copied", "name": 1, "sums": []}),
        *({"kind": "else"}, {"kind": "start", "format": 1, **HEADER}, {"kind": ["note"]}, {"text": "x"}),
        *({"kind": "samples", "origin": "", "written": 1, "sums": []}, {"kind": "polish", "result": {}, "sums": {}}),
    ],
)
def test_records_that_lack_something_end_the_reading(file, record):
    """They would have to be written on purpose, sums and all."""
    written(file, [{"kind": "note", "text": "a"}, record, {"kind": "note", "text": "b"}])
    assert len(read_journal(file)) == 2


def test_a_record_of_every_kind_is_read(file):
    values = [{"kind": kind, **{key: value() for key, value in SHAPES[kind].items()}} for kind in SHAPES]
    written(file, [value for value in values if value["kind"] != "start"])
    assert {record["kind"] for record in read_journal(file)} == SHAPES.keys()
    assert SHAPES.keys() >= {"samples", "copied", "layer", "lessons", "polish"}


@pytest.mark.parametrize("change", [{"layers": "9"}, {"signature": None}, {"format": 2}])
def test_a_header_of_another_kind_is_none(file, change):
    Journal.create(file, {**HEADER, **change}).close()
    assert read_journal(file) == []


def test_nothing_is_there(tmp_path):
    assert Journal.open(tmp_path / "journal") is None
    assert kept_words(tmp_path / "journal") == ""
    (tmp_path / "journal").mkdir()
    assert Journal.open(tmp_path / "journal") is None


def test_an_append_is_on_the_disk_before_it_returns(file, monkeypatch):
    synced = []
    real = os.fsync
    journal = Journal.create(file, HEADER)
    monkeypatch.setattr("qinit.workplace.journal.os.fsync", lambda fd: synced.append(file.read_bytes()) or real(fd))
    journal.append({"kind": "note", "text": "a"}, {"kind": "note", "text": "b"})
    journal.close()
    assert synced == [file.read_bytes()]
    assert synced[0].count(b"\n") == 3


def test_what_is_worth_keeping(file):
    layer = {"kind": "layer", "row": {"name": "a"}, "sums": []}
    text = {"kind": "samples", "origin": "", "written": True, "sums": []}
    written(file, [{"kind": "note", "text": "a"}, {**text, "written": False}])
    assert kept_words(file) == ""
    written(file, [text])
    assert kept_words(file) == "the text that the model wrote is kept"
    written(file, [text, {"kind": "sensitivity", "measured": {}}])
    assert kept_words(file) == "the measured sensitivities are kept"
    _, found = written(file, [text, layer, layer])
    assert kept_words(file) == "1 of 9 layers are kept"
    assert finished_layers(found) == {"a"}


def test_the_last_of_a_kind_counts(file):
    written(file, [{"kind": "note", "text": "a"}, {"kind": "note", "text": "b"}])
    journal = Journal.open(file)
    assert journal.find("note")["text"] == "b"
    assert journal.find("polish") is None
    journal.close()


def test_the_file_is_lines_of_json(file):
    whole, _ = written(file, [{"kind": "note", "text": "ä\n"}])
    for line in whole.decode("ascii").splitlines():
        digest, _, text = line.partition(" ")
        assert len(digest) == 64
        assert json.loads(text)["kind"] in ("start", "note")


def test_times_add_up(strong_llama, place, monkeypatch):
    break_off(strong_llama, place / "out", 3, **RANDOM)
    file = partial_of(place / "out") / "journal"
    journal = Journal.open(file)
    monkeypatch.setattr(Journal, "seconds", 1000.0)
    journal.append({"kind": "note", "text": "a long time"})
    journal.close()
    monkeypatch.undo()
    report = finish(strong_llama, place / "out", **RANDOM)[-1].report
    assert 1000 < report.totals["seconds"] < 1100
    assert "a long time" in report.notes
