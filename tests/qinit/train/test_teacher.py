from contextlib import suppress

import pytest
import torch

from qinit.errors import CalibrationError, CheckpointError
from qinit.events import Reading
from qinit.files.writer import SafetensorsWriter
from qinit.stream.feeding import inputs_of
from qinit.train import teacher as module
from qinit.train.outputs import observed
from qinit.train.teacher import Lessons, teach
from tests.broken_off import Crash
from tests.helpers import calibrated_plan, edit_tensors, exhausted, names, padded, random_samples
from tests.models import ENTANGLED, make_checkpoint, make_float32
from tests.qinit.train.starts import CPU, taught
from tests.traces import stock

FAMILIES = ["llama", "gpt2", "opt", "gemma2", "gemma4", "bert", "t5"]
LENGTHS = [12, 3, 7, 12, 9]


def outputs(plan, samples):
    """What the stock model makes of a text, all of it at once."""
    model = stock(plan)
    mask = None if samples.mask is None else samples.mask.long()
    with torch.no_grad():
        return observed(model, lambda: model(**inputs_of(model, samples.tokens, mask)))


def same(one, other):
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(tensor.read(), other.tensors[name].read()) for name, tensor in one.tensors.items()
    )


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(module, "LOGITS_BYTES", 2 * 4 * 256 * 12)  # two samples


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_the_stock_model_says_in_16_bits(family, mask, tmp_path):
    plan = calibrated_plan(make_float32(tmp_path / "m", family))
    samples = padded(random_samples(5), LENGTHS) if mask else random_samples(5)
    lessons = taught(plan, samples, tmp_path)
    hidden, logits = outputs(plan, samples)
    log_probs = logits.log_softmax(-1)
    kept = torch.ones_like(samples.tokens, dtype=torch.bool) if samples.mask is None else samples.mask
    for rows in ([0, 1, 2, 3, 4], [3, 1], [2]):
        lesson = lessons.of(rows, CPU)
        assert lesson.hidden.dtype == lesson.log_probs.dtype == torch.float32
        assert lesson.log_probs.shape == lesson.ids.shape == (len(rows), 12, module.TOP)
        here = kept[rows]
        found, wanted = lesson.hidden[here], hidden[rows][here]
        torch.testing.assert_close(found, wanted, rtol=2**-8, atol=1e-5 * float(wanted.abs().max()))
        top = log_probs[rows].topk(module.TOP, dim=-1).values[here]
        torch.testing.assert_close(lesson.log_probs[here], top, rtol=2**-10, atol=1e-4)
        named = log_probs[rows].gather(-1, lesson.ids)[here]
        torch.testing.assert_close(lesson.log_probs[here], named, rtol=2**-10, atol=1e-4)


def test_a_model_without_a_head_has_states_alone(tmp_path):
    plan = calibrated_plan(make_checkpoint(tmp_path / "m", "gpt2", "float32", model_class="GPT2Model"))
    samples = random_samples(3)
    lesson = taught(plan, samples, tmp_path).of([2, 0], CPU)
    assert (lesson.log_probs, lesson.ids) == (None, None)
    torch.testing.assert_close(lesson.hidden, outputs(plan, samples)[0][[2, 0]], rtol=2**-8, atol=1e-5)


def test_a_small_vocabulary_is_kept_whole(tmp_path):
    plan = calibrated_plan(make_float32(tmp_path / "m", vocab_size=24))
    samples = random_samples(2)
    samples.tokens.remainder_(24)
    lesson = taught(plan, samples, tmp_path).of([0, 1], CPU)
    assert lesson.ids.sort(-1).values.tolist() == [[list(range(24))] * 12] * 2
    torch.testing.assert_close(lesson.log_probs.exp().sum(-1), torch.ones(2, 12), rtol=0, atol=1e-3)


def test_how_many_run_at_once_does_not_matter(llama, tmp_path, monkeypatch):
    plan, samples = calibrated_plan(llama), random_samples(5)
    hidden = []
    for size in (1, 1 << 28):
        monkeypatch.setattr(module, "LOGITS_BYTES", size)
        (tmp_path / str(size)).mkdir()
        hidden.append(taught(plan, samples, tmp_path / str(size)).of(range(5), CPU).hidden)
    torch.testing.assert_close(*hidden, rtol=2**-7, atol=1e-5)


class TestDisk:
    def test_each_token_takes_two_bytes_for_a_number_and_six_for_a_next_token(self, llama, tmp_path):
        taught(calibrated_plan(llama), random_samples(5), tmp_path)
        (file,) = (tmp_path / "lessons").iterdir()
        numbers = 5 * 12 * (2 * 64 + 6 * module.TOP)
        assert numbers < file.stat().st_size < numbers + 8192

    def test_in_shards_it_is_the_same(self, llama, tmp_path, monkeypatch):
        plan, samples = calibrated_plan(llama), random_samples(5)
        (tmp_path / "one").mkdir()
        whole = taught(plan, samples, tmp_path / "one")
        monkeypatch.setattr(module, "SHARD_BYTES", 8000)
        cut = taught(plan, samples, tmp_path)
        assert len(list((tmp_path / "lessons").glob("*.safetensors"))) > 3
        assert same(whole, cut)
        assert torch.equal(whole.of([4, 0], CPU).ids, cut.of([4, 0], CPU).ids)

    def test_it_can_be_read_again_later(self, llama, tmp_path):
        lessons = taught(calibrated_plan(llama), random_samples(5), tmp_path)
        assert same(lessons, Lessons(tmp_path / "lessons"))
        assert len(lessons) == 5
        assert len(Lessons(tmp_path / "nowhere")) == 0

    def test_what_was_half_written_is_written_over(self, llama, tmp_path, monkeypatch):
        plan, samples = calibrated_plan(llama), random_samples(5)
        (tmp_path / "one").mkdir()
        whole = taught(plan, samples, tmp_path / "one")
        real, count = SafetensorsWriter.write, iter(range(9))

        def write(self, name, tensor):
            if next(count) == 8:
                raise Crash
            return real(self, name, tensor + 1)  # so that what is left there is not what will be

        with monkeypatch.context() as context:
            context.setattr(SafetensorsWriter, "write", write)
            with pytest.raises(Crash):
                taught(plan, samples, tmp_path)
        assert same(taught(plan, samples, tmp_path), whole)

    def test_states_that_memory_does_not_hold_are_on_disk_for_a_while(self, llama, tmp_path, monkeypatch):
        plan, samples = calibrated_plan(llama), random_samples(5)
        (tmp_path / "one").mkdir()
        in_memory = taught(plan, samples, tmp_path / "one")
        monkeypatch.setattr("qinit.stream.carried.CARRIED_SHARE", 0)
        (scratch := tmp_path / "scratch").mkdir()
        seen = [
            [path.name for path in scratch.glob("teacher-states-*/*")]
            for _ in teach(plan, samples, CPU, tmp_path / "lessons", scratch)
        ]
        assert seen == [["states"]] * 2
        assert names(scratch) == []
        assert same(Lessons(tmp_path / "lessons"), in_memory)

    def test_nothing_is_left_where_it_is_given_up(self, llama, tmp_path, monkeypatch):
        monkeypatch.setattr("qinit.stream.carried.CARRIED_SHARE", 0)
        (scratch := tmp_path / "scratch").mkdir()
        steps = teach(calibrated_plan(llama), random_samples(5), CPU, tmp_path / "lessons", scratch)
        next(steps)
        steps.close()
        assert names(scratch) == []


class TestEvents:
    def read(self, plan, tmp_path):
        return exhausted(teach(plan, random_samples(3), CPU, tmp_path / "lessons", tmp_path))[1]

    def test_every_block_is_told(self, tmp_path):
        plan = calibrated_plan(make_float32(tmp_path / "m", num_hidden_layers=3))
        assert self.read(plan, tmp_path) == [Reading(1, 3), Reading(2, 3), Reading(3, 3)]

    def test_a_whole_model_has_none(self, tmp_path):
        assert self.read(calibrated_plan(make_float32(tmp_path / "m", "gemma4", **ENTANGLED)), tmp_path) == []


class TestErrors:
    @pytest.mark.parametrize("family", ["llama", "t5"])
    def test_outputs_that_are_no_numbers_name_the_samples(self, family, tmp_path):
        source = make_float32(tmp_path / "m", family)
        norm = "model.norm.weight" if family == "llama" else "decoder.final_layer_norm.weight"
        edit_tensors(source / "model.safetensors", lambda tensors: tensors[norm].fill_(1e37))
        with pytest.raises(CalibrationError, match=r"samples 1 to 2 of the text \(a test\) are NaN or Inf.*other text"):
            taught(calibrated_plan(source), random_samples(3), tmp_path)

    @pytest.mark.parametrize("family", ["llama", "t5"])
    def test_a_checkpoint_that_is_damaged_is_named(self, family, tmp_path):
        source = make_float32(tmp_path / "m", family)
        plan = calibrated_plan(source)
        (source / "model.safetensors").write_bytes(b"broken")
        with pytest.raises((CheckpointError, CalibrationError), match=str(source)):
            taught(plan, random_samples(3), tmp_path)

    def test_tokens_that_the_model_does_not_have(self, tmp_path):
        plan, samples = calibrated_plan(make_float32(tmp_path / "m")), random_samples(3)
        samples.tokens[1, 3] = 10**6
        with pytest.raises(CalibrationError, match="does not run on token ids"):
            taught(plan, samples, tmp_path)


def test_the_caller_s_gradients_are_as_they_were(llama, tmp_path):
    steps = teach(calibrated_plan(llama), random_samples(3), CPU, tmp_path / "lessons", tmp_path)
    for _ in steps:
        assert torch.is_grad_enabled()
    with suppress(StopIteration):
        next(steps)
    assert torch.is_grad_enabled()
