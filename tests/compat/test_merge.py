"""What was trained on a packed base by stock loaders, merged: the same predictions without any of them."""

import pytest
import torch

from qinit.merge.plan import plan_merge
from qinit.merge.run import merge
from tests.helpers import quantize
from tests.peft_adapters import load_base, put_on
from tests.trained import train

IDS = torch.arange(3, 43).view(2, 20)


def test_a_merge_predicts_what_the_packed_base_and_the_trained_adapter_do(strong_llama, tmp_path):
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    quantize(strong_llama, tmp_path / "run", bits=2)
    train(tmp_path / "run", tmp_path / "trained")
    plan = plan_merge(tmp_path / "run", tmp_path / "trained", dtype="float32")
    assert plan.notes == ()  # it names the run as its base
    list(merge(plan, tmp_path / "out"))
    with torch.no_grad():
        expected = put_on(tmp_path / "run", tmp_path / "trained").eval()(input_ids=IDS).logits
        found = load_base(tmp_path / "out")(input_ids=IDS).logits
        start = load_base(tmp_path / "run")(input_ids=IDS).logits
    assert (expected - start).norm() > 0.01 * start.norm()
    assert (found - expected).norm() < 1e-5 * expected.norm()
