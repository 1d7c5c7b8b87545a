import os
import shutil
from pathlib import Path

import pytest
import torch

from qinit.errors import OutputError
from qinit.events import Discarded, Done, Noted, Resumed, Sampling
from qinit.planner.auto import Choice
from qinit.planner.make import make_plan
from qinit.recipe import make_recipe
from qinit.workplace.place import kept, partial_of
from tests.broken_off import RANDOM, TEXT, break_off, finish, result_in, start, undisturbed


class TestAnotherRun:
    @pytest.fixture
    def unfinished(self, strong_llama, place):
        events = start(strong_llama, place / "out", **RANDOM)
        for event in events:
            if isinstance(event, Done) and event.name.endswith("o_proj.weight"):
                break
        events.close()
        return place / "out"

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"bits": 3}, "bits was 2, now 3"),
            ({"rank": 8}, "rank was 4, now 8"),
            ({"seed": 7}, "seed was 0, now 7"),
            ({"exclude": "up_proj"}, "exclude was not given, now up_proj"),
            ({"calibration_samples": 9}, "calibration_samples was 8, now 9"),
            ({"calibration": "self"}, "calibration was random, now self"),
            ({"ratio": 0.5}, "ratio was not given, now 0.5"),
        ],
    )
    def test_it_is_refused_and_the_difference_is_shown(self, strong_llama, unfinished, change, words):
        with pytest.raises(OutputError) as caught:
            finish(strong_llama, unfinished, **{**RANDOM, **change})
        assert f"(4 of 14 layers are kept): {words}" in str(caught.value).replace("format was gptq, now dense; ", "")
        assert "to start anew pass --overwrite" in str(caught.value)
        assert kept(unfinished).startswith("4 of 14 layers")

    def test_another_source_another_version_and_another_number_of_threads_are_seen(
        self, strong_llama, tmp_path, place, monkeypatch
    ):
        model = Path(shutil.copytree(strong_llama, tmp_path / "model"))
        break_off(model, place / "out", 4, **RANDOM)
        file = model / "model.safetensors"
        os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns + 1))
        monkeypatch.setattr("qinit.workplace.signature.versions", lambda: {"torch": "9.9", "python": "4.0"})
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
        with pytest.raises(OutputError) as caught:
            finish(model, place / "out", **RANDOM)
        for words in (
            "the model's model.safetensors was ",
            f"version of torch was {torch.__version__.partition('+')[0]}",
            "now 9.9",
            "threads (OMP_NUM_THREADS) was ",
            "now 77",
        ):
            assert words in str(caught.value)
        assert "python" not in str(caught.value)

    def test_overwrite_discards_it_and_says_so(self, strong_llama, unfinished):
        events = finish(strong_llama, unfinished, overwrite=True, **{**RANDOM, "bits": 3})
        assert isinstance(events[0], Discarded)
        assert "was for something else (bits was 2, now 3)" in events[0].reason
        assert events[-1].report.recipe["bits"] == 3
        assert events[-1].report.notes == finish(strong_llama, unfinished.parent / "b", **RANDOM)[-1].report.notes

    def test_overwrite_goes_on_with_the_same(self, strong_llama, unfinished):
        assert isinstance(finish(strong_llama, unfinished, overwrite=True, **RANDOM)[0], Resumed)

    def test_one_without_a_finished_layer_is_no_obstacle(self, strong_llama, place):
        events = start(strong_llama, place / "out", **RANDOM)
        while not isinstance(next(events), Sampling):
            pass
        shutil.copytree(partial_of(place / "out"), place / "copy")
        events.close()
        (place / "copy").rename(partial_of(place / "out"))
        (partial_of(place / "out") / "lock").unlink()
        assert not isinstance(finish(strong_llama, place / "out", **{**RANDOM, "bits": 3})[0], Resumed | Discarded)

    def test_the_calibration_text_is_part_of_it(self, strong_llama, place, monkeypatch):
        from qinit.workplace.signature import signature

        file = place / "text.txt"
        file.write_text("one")
        monkeypatch.setattr("qinit.planner.make.check_source", lambda *_, **__: None)
        plan = make_plan(make_recipe(calibration=str(file)), strong_llama, "name")
        one = signature(plan, torch.device("cpu"))
        file.write_text("two")
        assert one != signature(plan, torch.device("cpu"))

    def test_auto_stays_what_it_was(self, strong_llama, place, monkeypatch):
        """It depends on the memory that is free just then."""
        choose = "qinit.planner.make.choose"
        monkeypatch.setattr(choose, lambda plan, device: Choice("self", "on its own text", 8))
        options = {**TEXT, "calibration": "auto"}
        wanted = undisturbed(strong_llama, place, **options)
        events = start(strong_llama, place / "out", **options)
        while not isinstance(next(events), Done):
            pass
        events.close()
        monkeypatch.setattr(choose, lambda plan, device: Choice("random", "no memory, 3 s", 4))
        finish(strong_llama, place / "out", **options)
        assert result_in(place / "out") == wanted

    def test_another_processor_is_noted(self, strong_llama, unfinished, monkeypatch):
        monkeypatch.setattr("qinit.workplace.resume.processor", lambda: "Another 3000")
        events = finish(strong_llama, unfinished, **RANDOM)
        assert isinstance(events[1], Noted)
        assert "now Another 3000), so that last bits may differ" in events[1].text
        assert events[1].text in events[-1].report.notes


def test_a_damaged_journal_is_said_and_the_run_starts_anew(strong_llama, place):
    wanted = undisturbed(strong_llama, place, **RANDOM)
    break_off(strong_llama, place / "out", 9, **RANDOM)
    journal = partial_of(place / "out") / "journal"
    journal.write_bytes(b"{" + journal.read_bytes())
    events = finish(strong_llama, place / "out", **RANDOM)
    assert events[0] == Discarded("the journal of an unfinished run is damaged")
    assert result_in(place / "out") == wanted
