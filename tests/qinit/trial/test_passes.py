import pytest
import torch

from qinit.trial.passes import Reached, distance, first_run, judged, learn, outputs_of
from tests.helpers import quantize
from tests.stock import load


@pytest.fixture
def model(llama, tmp_path):
    quantize(llama, tmp_path / "run", format="dense")
    return load(tmp_path / "run").eval()


@pytest.fixture
def watched(model, llama):
    """A model, what a pass has reached, and what it gave."""
    reached = Reached(model)
    _, outputs = first_run(model, llama)
    reached.close()
    return model, reached, outputs


def test_every_factor_of_a_start_learns(watched):
    model, reached, outputs = watched
    assert [*learn(outputs, model, reached)] == []
    assert len(reached.names) == 14


def test_a_b_of_zeros_gives_its_a_no_gradient_and_that_is_right(model, llama):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    reached = Reached(model)
    _, outputs = first_run(model, llama)
    assert [*learn(outputs, model, reached)] == []


def test_what_does_not_learn_is_named_and_what_was_not_reached_too(watched):
    model, reached, outputs = watched
    list(learn(outputs, model, reached))
    names = sorted(reached.names)
    modules = [reached.modules[name] for name in names]
    modules[0].lora_A["default"].weight.grad = None
    modules[1].lora_B["default"].weight.grad.fill_(torch.nan)
    modules[2].lora_B["default"].weight.grad.zero_()
    reached.names.discard(names[3])
    assert [*judged(model, reached)] == [
        (True, f"no gradient reaches the factors of {names[0]}, though its inputs do"),
        (True, f"the gradients of {names[1]} are not finite"),
        (False, f"the gradients of {names[2]} are zero on these inputs"),
        (False, f"not tried, as these inputs do not reach it: {names[3]}"),
    ]


def test_an_adapter_that_no_output_depends_on_trains_nothing(watched):
    model, reached, outputs = watched
    ((grave, what),) = learn([each.detach() for each in outputs], model, reached)
    assert grave
    assert "nothing is trained" in what


def test_a_model_that_takes_no_known_inputs_says_why(model, llama, monkeypatch):
    def refuse(**_):
        raise ValueError("give me\nmore")

    monkeypatch.setattr(model, "forward", refuse)
    assert first_run(model, llama) == "input_ids: ValueError: give me more"


def test_distances_are_relative_and_other_shapes_are_far():
    one = torch.ones(4)
    assert distance([one, 3 * one], [one, 2 * one]) == pytest.approx(0.5)
    assert distance([one], [torch.ones(5)]) == float("inf")
    assert distance([], []) == 0
    nan = distance([one * torch.nan], [one])
    assert not nan <= 1


def test_all_tensors_of_floating_point_are_outputs():
    def model(**_):
        return {"logits": torch.ones(2), "ids": torch.ones(2, dtype=torch.long), "more": (torch.zeros(3), None)}

    assert [each.shape[0] for each in outputs_of(model, {})] == [2, 3]
