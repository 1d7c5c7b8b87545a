import pytest
import torch
from torch import nn

from qinit.stream.rows import Row
from qinit.train.polish import enable_checkpointing
from qinit.train.repaired import Repaired
from qinit.train.student import student_of
from tests.helpers import edit_tensors, random_samples
from tests.models import make_checkpoint, make_float32
from tests.qinit.train.starts import CPU, begin, dense, text, weight_of
from tests.traces import assert_close, stock

FAMILIES = ["llama", "gpt2", "opt", "gemma2", "gemma4", "bert", "t5"]


def inputs(model, samples):
    decoder = {"decoder_input_ids": samples.tokens} if model.config.is_encoder_decoder else {}
    return {"input_ids": samples.tokens, **decoder}


def linears(model):
    from transformers.pytorch_utils import Conv1D

    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def repaired(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, Repaired)}


def twin(plan, starts):
    """The stock model with Q + B A in its layers."""
    from transformers.pytorch_utils import Conv1D

    model = stock(plan)
    for name, start in starts.items():
        weight, module = weight_of(start) + start.low_rank.B @ start.low_rank.A, model.get_submodule(name)
        module.weight.data = weight.T.contiguous() if isinstance(module, Conv1D) else weight
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_as_the_stock_model_with_q_and_the_product(family, tmp_path):
    plan, starts = begin(make_float32(tmp_path / "m", family, initializer_range=0.1))
    assert starts.keys() == {layer.target.name for layer in plan.quantized}
    wanted = twin(plan, starts)
    with torch.no_grad():
        logits = wanted(**inputs(wanted, random_samples())).logits
        for given in (starts, dense(starts)):
            with student_of(plan, given, CPU) as student:
                assert type(student) is type(wanted)
                assert repaired(student).keys() == starts.keys()
                assert_close(student(**inputs(student, random_samples())).logits, logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_factors_and_scales_ask_for_gradients_and_all_get_one(family, tmp_path):
    plan, starts = begin(make_float32(tmp_path / "m", family, initializer_range=0.1))
    with student_of(plan, starts, CPU) as student:
        trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
        assert trained == {f"{name}.{part}" for name in starts for part in ("A", "B", "base.stretch")}
        student(**inputs(student, random_samples())).logits.square().sum().backward()
        for name, parameter in student.named_parameters():
            assert (parameter.grad is not None and bool(parameter.grad.any())) == (name in trained), name


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_it_is_without_memory(family, tmp_path):
    with student_of(*begin(make_checkpoint(tmp_path / "m", family)), CPU) as student:
        assert not any(parameter.is_meta for parameter in student.parameters())
        assert not any(buffer.is_meta for buffer in student.buffers())
        assert not student.training
        assert {p.dtype for p in student.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "t5"])
def test_blocks_are_computed_again_with_the_gradients_of_a_plain_pass(family, tmp_path):
    """Dropout stays off although the blocks are told that they are trained: all but Llama have it."""
    plan, starts = begin(make_float32(tmp_path / "m", family, initializer_range=0.1))
    gradients, calls = [], []
    for checkpointed in (True, False):
        with student_of(plan, starts, CPU) as student:
            if checkpointed:
                enable_checkpointing(student)
            first = student.get_submodule(next(iter(starts)))
            first.register_forward_hook(lambda *_: calls.append(len(gradients)))
            student(**inputs(student, text()), use_cache=False).logits.square().mean().backward()
            gradients.append({name: p.grad for name, p in student.named_parameters() if p.requires_grad})
    assert calls == [0, 0, 1]
    for name, gradient in gradients[0].items():
        assert_close(gradient, gradients[1][name])


@pytest.mark.parametrize("family", ["gpt2", "opt", "bert", "t5"])
def test_no_model_drops_anything_even_in_training(family, tmp_path):
    """OPT leaves out whole layers too."""
    more = {"layerdrop": 0.5} if family == "opt" else {}
    plan, starts = begin(make_float32(tmp_path / "m", family, initializer_range=0.1, **more))
    with torch.no_grad(), student_of(plan, starts, CPU) as student:
        wanted = student(**inputs(student, text())).logits
        enable_checkpointing(student)
        for module in student.modules():
            module.training = module.training or hasattr(module, "gradient_checkpointing")
        first, *others = (student(**inputs(student, text()), use_cache=False).logits for _ in range(3))
        assert all(torch.equal(first, other) for other in others)
        assert_close(first, wanted, 1e-5)


class TestAfterwards:
    def test_layers_outside_of_the_blocks_are_the_model_s_own_again(self, tmp_path):
        plan, starts = begin(make_float32(tmp_path / "m", "bert"))
        outside = "cls.predictions.transform.dense"
        assert outside in starts
        with student_of(plan, starts, CPU) as student:
            assert isinstance(student.get_submodule(outside), Repaired)
        assert isinstance(student.get_submodule(outside), nn.Linear)
        assert all(parameter.is_meta for name, parameter in student.named_parameters() if ".layer." not in name)

    def test_an_error_inside_is_handed_on(self, tmp_path):
        plan, starts = begin(make_float32(tmp_path / "m", "bert"))
        with pytest.raises(ZeroDivisionError), student_of(plan, starts, CPU) as student:
            1 / 0  # noqa: B018
        assert not repaired(student).keys() & {"cls.predictions.transform.dense"}

    def test_the_starts_are_the_caller_s_own(self, start):
        plan, starts = start
        before = {name: (s.base.codes.clone(), s.low_rank.B.clone()) for name, s in starts.items()}
        with student_of(plan, starts, CPU) as student:
            for parameter in student.parameters():
                parameter.data.fill_(1.0)
        assert all(torch.equal(starts[name].base.codes, codes) for name, (codes, _) in before.items())
        assert all(torch.equal(starts[name].low_rank.B, B) for name, (_, B) in before.items())


class TestMemory:
    def test_no_more_than_one_block_s_weights_are_there_while_it_is_put_together(self, tmp_path, monkeypatch):
        plan, starts = begin(make_checkpoint(tmp_path / "m", num_hidden_layers=4))
        seen, real = [], Row.load

        def load(self, index):
            block = real(self, index)
            seen.append({name for name, module in linears(self._owner.model).items() if not module.weight.is_meta})
            return block

        monkeypatch.setattr(Row, "load", load)
        with student_of(plan, starts, CPU) as student:
            assert linears(student).keys() == {"lm_head"}
        assert [{name.split(".")[2] for name in names} for names in seen] == [{"0"}, {"1"}, {"2"}, {"3"}]

    def test_it_holds_half_a_byte_for_a_weight_and_what_is_trained(self, start):
        plan, starts = start
        with student_of(plan, starts, CPU) as student:
            for name, module in repaired(student).items():
                stored = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
                out, inner = starts[name].base.codes.shape
                groups = out * inner // 32
                assert stored == out * inner // 2 + groups + 2 * 4 * groups + 4 * 4 * (out + inner)


def test_a_model_whose_checkpoint_lacks_a_tensor_is_loaded_whole(tmp_path, monkeypatch):
    """The norm is made anew by transformers, of ones: what it was."""
    source, tokens = make_float32(tmp_path / "m"), random_samples().tokens
    with student_of(*begin(source), CPU) as student:
        streamed = student(tokens).logits.detach()
    edit_tensors(source / "model.safetensors", lambda tensors: tensors.pop("model.norm.weight"))
    plan, starts = begin(source)
    monkeypatch.setattr(Row, "load", None)
    with student_of(plan, starts, CPU) as student:
        assert repaired(student).keys() == starts.keys()
        assert {name for name, p in student.named_parameters() if p.requires_grad} == {
            f"{name}.{part}" for name in starts for part in ("A", "B", "base.stretch")
        }
        assert torch.equal(student(tokens).logits, streamed)
    assert linears(student).keys() == {*starts, "lm_head"}  # its own are back
