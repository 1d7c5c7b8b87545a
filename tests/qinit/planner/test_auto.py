import pytest
import torch

from qinit.planner import auto as choice
from qinit.planner.auto import Choice, _counts, choose
from qinit.planner.nominal import calibrating_seconds, solving_seconds
from qinit.text import sources
from qinit.text.self_text import model_bytes
from tests.helpers import edit_json, plan_of
from tests.models import add_tokenizer, make_bert, make_checkpoint, make_float32

CPU = torch.device("cpu")
PLENTY, NOTHING = "100h", "0.000001s"


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine with 8 GB free."""
    monkeypatch.setattr(choice, "free_memory", lambda device: 8 * 10**9)


def chosen(source, **options):
    """Return what `auto` becomes for a checkpoint, under a budget that holds all unless told otherwise."""
    return choose(plan_of(source, **{"calibration_budget": PLENTY, **options}), CPU)


def budget(source, text, samples):
    """Return a budget that just holds so many samples."""
    plan = plan_of(source)
    seconds = calibrating_seconds(plan, text, samples) + solving_seconds(plan, calibrated=True)
    return f"{1.001 * seconds:.9f}s"


class TestOwnText:
    def test_it_is_the_first_choice(self, reader):
        found = chosen(reader)
        assert (found.source, found.samples) == ("self", 128)
        assert found.reason.startswith(
            "on text that the model writes itself, 128 samples of 128 tokens (16384), about 1 s at nominal speed"
        )
        assert "over" not in found.reason

    @pytest.mark.parametrize("samples", [96, 64, 32])
    def test_it_gets_fewer_samples_where_all_are_beyond_the_budget(self, reader, samples, monkeypatch):
        monkeypatch.setattr("qinit.planner.nominal.STEP_SECONDS", 0.0)  # as in a large model, where arithmetic counts
        found = chosen(reader, calibration_budget=budget(reader, "self", samples))
        assert (found.source, found.samples) == ("self", samples)
        assert f"on text that the model writes itself, {samples} samples of 128 tokens" in found.reason
        assert "128 samples of text that the model writes itself would take 1 s, over --calibration-budget" in (
            found.reason
        )

    def test_what_was_asked_for_is_not_reduced(self, reader):
        """But text that needs no writing takes its place."""
        options = {"calibration_samples": 128, "calibration_budget": budget(reader, "self", 64)}
        found = chosen(reader, **options)
        assert (found.source, found.samples) == ("text", 128)

    def test_many_times_the_tokens_of_other_text_are_better(self, reader, monkeypatch):
        monkeypatch.setattr(choice, "WORTH_MORE", 2)
        monkeypatch.setattr("qinit.planner.nominal.STEP_SECONDS", 1.0)  # writing takes nearly all the time
        assert chosen(reader, calibration_budget=budget(reader, "self", 64)).source == "text"

    @pytest.mark.parametrize(("times", "expected"), [(1.9, "text"), (2.1, "self")])
    def test_the_model_must_fit_into_half_of_the_free_memory(self, reader, monkeypatch, times, expected):
        nbytes = model_bytes(plan_of(reader).bytes_before, CPU)
        monkeypatch.setattr(choice, "free_memory", lambda device: int(times * nbytes))
        found = chosen(reader)
        assert found.source == expected
        assert ("GB that are free" in found.reason) is (expected == "text")

    def test_a_busy_machine_chooses_as_an_idle_one(self, reader, monkeypatch):
        before = chosen(reader, calibration_budget=budget(reader, "self", 64))
        monkeypatch.setattr("qinit.planner.operations.timed", lambda action, device: 1e3)
        assert chosen(reader, calibration_budget=budget(reader, "self", 64)) == before


class TestOtherText:
    @pytest.mark.parametrize("options", [{"bits": 2}, {"bits": 3}, {"ratio": 0.5}, {"target_bits": 3.0}])
    def test_at_two_or_three_bits_the_least_is_taken_beyond_the_budget_too(self, reader, options):
        found = chosen(reader, calibration_budget=NOTHING, **options)
        assert (found.source, found.samples) == ("text", 32)  # of 128 tokens
        assert "on text that qinit brings, 32 samples of 128 tokens (4096)" in found.reason
        assert f"over --calibration-budget {NOTHING}, but without any the start would be broken" in found.reason

    @pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 8}, {"ratio": 0.5, "bits_low": 4, "bits_high": 8}])
    def test_at_four_bits_and_more_it_is_left_out(self, reader, options):
        found = chosen(reader, calibration_budget=NOTHING, **options)
        assert (found.source, found.samples) == ("none", None)
        assert found.reason.endswith("give --calibration text to have it")
        assert "32 samples of text that qinit brings would take" in found.reason
        assert chosen(reader, bits=4).source == "self"

    def test_an_encoder_reads_it(self, tmp_path):
        found = chosen(make_bert(tmp_path / "bert"), format="dense")
        assert (found.source, found.samples) == ("text", 128)
        assert "the model writes no text of its own" in found.reason

    def test_so_does_a_model_without_a_token_to_start_from(self, tmp_path):
        source = add_tokenizer(make_float32(tmp_path / "m", "llama", bos_token_id=None, eos_token_id=None))
        assert chosen(source).source == "text"

    def test_without_a_tokenizer_random_tokens_take_its_place(self, llama):
        found = chosen(llama, calibration_budget=NOTHING)
        assert found.source == "random"
        assert "on random tokens, 32 samples" in found.reason
        assert "there is no tokenizer that could read text" in found.reason

    def test_but_not_that_of_own_text(self, llama):
        assert chosen(llama, calibration_budget=budget(llama, "self", 32)).source == "self"

    def test_an_encoder_decoder_reads_text_whatever_memory_is_free(self, tmp_path, monkeypatch):
        source = add_tokenizer(make_checkpoint(tmp_path / "t5", "t5"))
        monkeypatch.setattr(choice, "free_memory", lambda device: 10**5)
        assert chosen(source, format="dense").source == "text"

    def test_a_model_that_reads_no_tokens_gets_none(self, tmp_path):
        found = chosen(make_checkpoint(tmp_path / "m", "dinov2"), format="dense")
        assert found == Choice("none", "the model does not run on tokens alone")

    def test_one_that_also_sees_writes_its_own_text(self, tmp_path):
        assert chosen(make_checkpoint(tmp_path / "m", "llava")).source == "self"

    def test_ids_beyond_the_vocabulary_lead_to_other_text_and_then_to_random_tokens(self, tmp_path):
        source = add_tokenizer(make_checkpoint(tmp_path / "m", bos_token_id=300))
        found = chosen(source)
        assert found.source == "text"
        assert "as it starts with token 300 of a vocabulary of 256" in found.reason
        edit_json(source / "tokenizer.json", lambda tokenizer: tokenizer["model"]["vocab"].update({"<unk>": 999}))
        edit_json(source / "tokenizer.json", lambda tokenizer: tokenizer["added_tokens"][-1].update(id=999))
        found = chosen(source)
        assert found.source == "random"
        assert "the tokenizer is that of another model" in found.reason


def test_methods_without_calibration_get_none(reader):
    found = chosen(reader, method="loftq", format="dense")
    assert found == Choice("none", "method loftq takes none")


def test_numbers_of_samples_come_down_in_steps_of_a_third_or_less_to_the_least():
    assert _counts(128, 8) == [128, 96, 64, 48, 32, 24, 16, 8]
    assert _counts(128, 32) == [128, 96, 64, 32]
    assert _counts(4, 8) == [4]


def test_a_plan_loads_the_tokenizer_once(reader, monkeypatch):
    loaded, real = [], sources.load_tokenizer

    def counted(*arguments):
        loaded.append(arguments)
        return real(*arguments)

    monkeypatch.setattr("qinit.planner.make.choose", choose)
    monkeypatch.setattr(sources, "load_tokenizer", counted)
    plan = plan_of(reader, calibration="auto", calibration_budget=NOTHING)
    assert (plan.recipe.calibration, len(loaded)) == ("text", 1)
