import pytest
import torch

from qinit.plan.limits import GRADIENT_LENGTH, GRADIENT_SAMPLES
from qinit.text import for_run as module
from qinit.text.for_run import polish_text, text_for
from tests.helpers import plan_of
from tests.models import make_bert, words

CPU = torch.device("cpu")


def test_it_is_the_text_that_the_recipe_asks_for(reader, tmp_path):
    (tmp_path / "text.jsonl").write_text(f'{{"body": "{words(*range(4, 204))}"}}\n')
    options = {"calibration": str(tmp_path / "text.jsonl"), "text_field": "body", "seed": 3}
    plan = plan_of(reader, calibration_samples=4, calibration_length=10, **options)
    found = text_for(plan, CPU, None)
    assert found.origin == "4 windows of 10 tokens from text.jsonl, seed 3"
    assert all(row == list(range(row[0], row[0] + 10)) for row in found.tokens.tolist())


def test_the_token_and_the_device_are_handed_on(llama, monkeypatch):
    asked = {}
    monkeypatch.setattr(module, "load_samples", lambda *_, **options: asked.update(options))
    text_for(plan_of(llama, calibration="random", trust_remote_code=True), CPU, "hf_secret")
    assert (asked["token"], asked["device"], asked["trust_remote_code"]) == ("hf_secret", CPU, True)


@pytest.mark.parametrize(("memory", "words"), [(10**10, "wrote itself"), (10**5, "random tokens")])
def test_without_calibration_it_is_a_little_of_the_models_own_where_that_fits(llama, monkeypatch, memory, words):
    monkeypatch.setattr(module, "GRADIENT_LENGTH", 8)
    monkeypatch.setattr(module, "free_memory", lambda device: memory)
    found = text_for(plan_of(llama, calibration_samples=99, calibration_length=99), CPU, None)
    assert words in found.origin
    assert found.tokens.shape == (GRADIENT_SAMPLES, 8)
    assert GRADIENT_LENGTH > 8


def test_a_model_that_writes_no_text_reads_random_tokens(tmp_path):
    found = text_for(plan_of(make_bert(tmp_path / "bert"), format="dense"), CPU, None)
    assert "random tokens" in found.origin
    assert found.tokens.shape == (GRADIENT_SAMPLES, 32)  # as many positions as it has


class TestPolish:
    def more(self, model, tokens, **options):
        plan = plan_of(model, **{"calibration_samples": 4, "calibration_length": 8, "polish": 1, **options})
        samples = text_for(plan, CPU, None)
        return samples, polish_text(plan, samples, tokens, CPU, None)

    def test_own_text_goes_on_with_text_that_qinit_brings(self, reader):
        samples, more = self.more(reader, 50, calibration="self", seed=3)
        assert more.tokens.shape == (7, 8)
        assert torch.equal(more.tokens[:4], samples.tokens)
        rest = {"calibration": "text", "calibration_samples": 3, "calibration_length": 8, "seed": 3}
        brought = text_for(plan_of(reader, **rest), CPU, None)
        assert torch.equal(more.tokens[4:], brought.tokens)
        assert more.origin == f"{samples.origin}; and {brought.origin}"

    def test_no_more_is_asked_than_the_model_has_positions(self, reader):
        _, more = self.more(reader, 700, calibration="self", calibration_length=1000)
        assert more.tokens.shape == (6, 128)

    def test_without_a_tokenizer_own_text_goes_on_with_what_is_not_written_yet(self, llama):
        samples, more = self.more(llama, 50, calibration="self", seed=3)
        assert more.tokens.shape == (7, 8)
        assert torch.equal(more.tokens[:4], samples.tokens)
        assert len(more.tokens.unique(dim=0)) == 7
        assert more.origin == f"{samples.origin}; and 3 texts of 8 tokens that the model wrote itself, seed 4"

    def test_a_file_gives_more_windows_as_far_as_it_goes(self, reader, tmp_path):
        (tmp_path / "text.txt").write_text(words(*range(4, 84)))
        _, more = self.more(reader, 48, calibration=str(tmp_path / "text.txt"))
        assert more.tokens.shape == (6, 8)

    def test_enough_is_enough(self, llama):
        samples, more = self.more(llama, 32, calibration="random")
        assert more is samples
        assert self.more(llama, 33, calibration="random")[1].tokens.shape == (5, 8)

    def test_an_encoder_keeps_its_text(self, tmp_path):
        samples, more = self.more(make_bert(tmp_path / "bert"), 1000, calibration="random", format="dense")
        assert more is samples
