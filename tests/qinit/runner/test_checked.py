"""What a run is measured to be at its end: on tokens that it has not seen, whatever it is made of, and changing nothing
of what it wrote."""

import pytest
import torch

from qinit.errors import QinitError
from qinit.evaluate.subject import Subject
from qinit.evaluate.windows import cut_windows
from qinit.events import Checking, Noted
from qinit.recipe import make_recipe
from qinit.runner import checked as module
from qinit.stream.calls import NotStreamable
from qinit.text.bundled import check_documents
from qinit.text.tokens import load_tokenizer
from tests.broken_off import PLAIN, RANDOM, Crash, finish, result_in, undisturbed
from tests.evaluated import figures, make_source, subject
from tests.helpers import contents, plan_of, quantize
from tests.models import make_bert, make_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model that predicts with some certainty, with the word tokenizer."""
    return make_source(tmp_path_factory.mktemp("source") / "llama")


class TestFigures:
    @pytest.mark.parametrize("format", ["gptq", "dense"])
    def test_they_are_those_of_an_evaluation_on_the_same_windows(self, source, tmp_path, format):
        row = quantize(source, tmp_path / "out", format=format, check=True).totals["check"]
        text = "\n\n".join(check_documents())
        ids = torch.tensor(load_tokenizer(source)(text, verbose=False).input_ids)
        windows = cut_windows(ids, 128, limit=8)
        original = Subject("original", source)
        wanted = figures(subject(tmp_path / "out"), original, windows, stream="always", batch_size=1)
        assert (row["kl"], row["top1_agreement"], row["loss"]) == (wanted.kl, wanted.agreement, wanted.loss)
        assert (row["perplexity"], row["reference_perplexity"]) == (wanted.perplexity, wanted.reference_perplexity)
        assert (row["windows"], row["length"], row["tokens"]) == (8, 128, 8 * 127)

    def test_a_calibrated_run_is_measured_on_more(self, source, tmp_path):
        few = {"calibration": "random", "calibration_samples": 8, "calibration_length": 16}
        assert quantize(source, tmp_path / "out", check=True, **few).totals["check"]["windows"] == 2048 // 128

    def test_without_a_tokenizer_there_are_random_tokens_and_the_report_says_so(self, strong_llama, tmp_path):
        row = quantize(strong_llama, tmp_path / "out", check=True).totals["check"]
        assert row["text"] == "random tokens, as there is no tokenizer"
        assert row["joined"] == "drawn with seed 1"
        assert 0 < row["kl"] < 100
        assert 0 <= row["top1_agreement"] <= 1

    def test_it_changes_nothing_of_what_is_written(self, source, tmp_path):
        quantize(source, tmp_path / "with", check=True)
        quantize(source, tmp_path / "without")
        one, other = (contents(tmp_path / name) for name in ("with", "without"))
        assert one.keys() == other.keys()
        changed = {name for name in one if one[name] != other[name]}
        assert changed == {"README.md", "SHA256SUMS", "qinit.json", "eqft_init/adapter_config.json"}  # its own place

    def test_its_progress_is_told(self, source, tmp_path):
        steps = [
            event.step for event in finish(source, tmp_path / "out", **PLAIN, check=True) if type(event) is Checking
        ]
        assert steps[0] == "loading the run"
        assert {"the run, block by block", "llama, block by block", "comparing predictions"} <= set(steps)


class TestInMemory:
    @pytest.fixture(autouse=True)
    def not_streamed(self, monkeypatch):
        def refuse(*_):
            raise NotStreamable("its blocks need each other")
            yield

        monkeypatch.setattr(module, "streamed", refuse)

    def test_a_model_that_is_no_row_of_blocks_is_loaded(self, source, tmp_path):
        row = quantize(source, tmp_path / "out", format="dense", check=True).totals["check"]
        assert not row["streamed"]
        wanted = figures(subject(tmp_path / "out"), Subject("original", source), _windows_of(source), stream="never")
        assert row["kl"] == pytest.approx(wanted.kl, rel=1e-4)

    def test_one_that_does_not_fit_is_left_out_with_the_reason(self, source, tmp_path, monkeypatch):
        monkeypatch.setattr("qinit.evaluate.job.free_memory", lambda device: 1)
        report = quantize(source, tmp_path / "out", format="dense", check=True)
        assert "check" not in report.totals
        (note,) = report.notes
        assert note.startswith("check: left out (its blocks need each other, and in memory not either: 0.00 GB needed")


def _windows_of(source):
    ids = torch.tensor(load_tokenizer(source)("\n\n".join(check_documents()), verbose=False).input_ids)
    return cut_windows(ids, 128, limit=8)


class TestLeftOut:
    def test_as_asked_without_a_word(self, source, tmp_path):
        report = quantize(source, tmp_path / "out", check=False)
        assert ("check" in report.totals, report.notes) == (False, ())

    def test_for_a_model_that_predicts_no_next_token(self, tmp_path):
        report = quantize(make_bert(tmp_path / "bert"), tmp_path / "out", format="dense", check=True)
        assert report.notes == ("check: left out, as the model predicts no next token",)
        assert "check" not in report.totals

    def test_for_one_that_says_no_vocabulary_and_has_no_tokenizer(self, llama, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "load_samples", _raises(QinitError(f"{llama}/config.json: no vocab_size")))
        report = quantize(llama, tmp_path / "out", check=True)
        assert report.notes == ("check: left out (the model/config.json: no vocab_size)",)

    @pytest.mark.parametrize(
        "error",
        [
            QinitError("NaN or Inf\nin it"),
            torch.OutOfMemoryError("full"),
            RuntimeError("size 512 must match 128"),
            IndexError("index out of range in self"),
        ],
    )
    def test_where_it_fails_the_run_is_whole_all_the_same(self, source, tmp_path, monkeypatch, error):
        monkeypatch.setattr(module, "streamed", _raises(error))
        report = quantize(source, tmp_path / "out", check=True)
        assert report.notes == (f"check: left out ({' '.join(str(error).split())})",)
        assert (tmp_path / "out/SHA256SUMS").is_file()


def _raises(error):
    def call(*_, **__):
        raise error

    return call


class TestBroken:
    def test_it_is_said_with_what_to_do(self, source, tmp_path):
        report = quantize(source, tmp_path / "out", check=True)
        assert report.totals["check"]["kl"] > 1
        (note,) = report.notes
        assert note.startswith("check: this start is broken, its predictions are far from the original's (KL ")
        assert (
            "calibrate (--calibration self or text), give more bits (--bits 3), polish (--polish 100) or take a" in note
        )
        events = finish(source, tmp_path / "again", **PLAIN, check=True)
        assert [event.text for event in events if isinstance(event, Noted)] == [note]

    def test_a_good_start_is_not_warned_of(self, source, tmp_path):
        report = quantize(source, tmp_path / "out", bits=8, check=True)
        assert report.totals["check"]["kl"] < 0.1
        assert report.notes == ()


ROW = {"kl": 4.77, "top1_agreement": 0.11}


@pytest.mark.parametrize(
    ("options", "said", "unsaid"),
    [
        (
            {"calibration": "none"},
            ["calibrate (--calibration self or text)", "--bits 3", "--polish 100", "--rank 32"],
            [],
        ),
        ({"calibration": "random", "bits": 3}, ["--calibration self or text", "--bits 4"], []),
        ({"calibration": "text", "polish": 9}, ["--calibration-samples, --calibration-budget"], ["--polish"]),
        ({"calibration": "self", "bits": 8, "rank": 4}, ["--rank 8"], ["--bits"]),
        ({"calibration": "none", "ratio": 0.5}, ["--ratio or --target-bits"], ["--bits"]),
        ({"method": "loftq", "format": "dense"}, ["take method eqft and calibrate"], []),
    ],
)
def test_a_broken_start_is_said_with_what_was_not_done_yet(options, said, unsaid):
    note = module.broken_note(ROW, make_recipe(**options))
    start = (
        "check: this start is broken, its predictions are far from the original's (KL 4.77 nats per token, the same "
    )
    assert note.startswith(start + "top token for 11 %); to start closer: ")
    assert all(words in note for words in said)
    assert not any(words in note for words in unsaid)


def test_up_to_one_nat_nothing_is_said():
    assert module.broken_note({**ROW, "kl": 1.0}, make_recipe()) is None


class TestResumed:
    def test_a_run_that_was_killed_while_it_was_measured_ends_the_same(self, strong_llama, place, monkeypatch):
        options = {**RANDOM, "check": True}
        wanted = undisturbed(strong_llama, place, **options)
        assert "check" in wanted["qinit.json"]["totals"]
        with monkeypatch.context() as context:
            context.setattr(module, "row_of", _raises(Crash))
            with pytest.raises(Crash):
                finish(strong_llama, place / "out", **options)
        finish(strong_llama, place / "out", **options)
        assert result_in(place / "out") == wanted

    def test_it_may_be_left_out_then(self, strong_llama, place, monkeypatch):
        with monkeypatch.context() as context:
            context.setattr(module, "row_of", _raises(Crash))
            with pytest.raises(Crash):
                finish(strong_llama, place / "out", **RANDOM, check=True)
        finish(strong_llama, place / "out", **RANDOM, check=False)
        assert "check" not in result_in(place / "out")["qinit.json"]["totals"]


@pytest.mark.parametrize("family", ["gpt2", "opt", "phi3", "gemma"])
def test_other_families_are_measured_too(tmp_path, family):
    report = quantize(make_checkpoint(tmp_path / family, family), tmp_path / "out", format="dense", check=True)
    assert report.totals["check"]["streamed"]


def test_a_plan_made_by_hand_has_its_samples_within_the_model(strong_llama):
    plan = plan_of(strong_llama, check=True)
    _, tokens, windows = module._windows(plan)
    assert windows.length == 128
    assert len(tokens.ids) == 8 * 128
