import shutil

import pytest
import torch
from transformers import TrainerCallback

from qinit.errors import CheckpointError, RecipeError
from tests.qinit.snndlft import tiny


class Watch(TrainerCallback):
    """Notes after each optimizer step which layers have gradients, which have a state, and what is masked."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.gradients = {n.split(".")[4] for n, p in model.named_parameters() if "lora_" in n and p.grad is not None}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **_):
        lora = {name: p for name, p in model.named_parameters() if "lora_" in name}
        masked = {name: (p == 0).flatten().tolist() for name, p in lora.items() if "lora_E" in name}
        states = {name.split(".")[4] for name, p in lora.items() if p in optimizer.state}
        trains = {name.split(".")[4] for name, p in lora.items() if p.requires_grad}
        self.seen.append((self.gradients, states, trains, masked))


@pytest.mark.usefixtures("snn")
@pytest.mark.parametrize(("layer_wise", "count"), [("single", 1), ("half", 2), ("all", 3)])
def test_layers_are_chosen_after_the_warm_up_and_fixed_at_the_end(tmp_path, layer_wise, count):
    watch = Watch()
    options = tiny.config(layer_wise=layer_wise, tinit=2, tfinal=3, time_steps=2)
    model, callback = tiny.trained(options, tmp_path, steps=8, callbacks=[watch])
    gradients, states, trains, masked = zip(*watch.seen, strict=True)
    assert [len(each) for each in trains] == [3] * 2 + [count] * 6
    assert list(gradients[1:]) == list(trains[:-1])  # of a step those that were chosen after the one before
    assert all(state <= trained for state, trained in zip(states, trains, strict=True))  # a new one has its state later
    assert masked[4] == masked[5] == masked[6] == masked[7]  # step 5 was the last to allocate
    assert trains[4] == trains[5] == trains[6] == trains[7]
    assert callback.course.steps == {f"model.layers.{i}": sum(str(i) in each for each in gradients) for i in range(3)}
    last = callback.course.moments[-1]
    assert (last.step, last.trained) == (8, tuple(f"model.layers.{i}" for i in sorted(trains[-1])))
    assert sum(last.ranks.values()) == sum(row.count(False) for row in masked[-1].values()) == 2 * 6
    assert last.trainable == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n and p.requires_grad)
    assert set(last.rates) == {f"model.layers.{i}" for i in range(3)}
    assert all(0 < rate < 1 for rate in last.rates.values())


@pytest.mark.usefixtures("snn")
def test_a_run_that_goes_on_from_a_checkpoint_ends_the_same(tmp_path):
    options = tiny.config(layer_wise="single", tinit=1, deltaT=2, lora_dropout=0.1)
    whole, callback = tiny.trained(options, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoint-6")
    again, resumed = tiny.trained(options, tmp_path / "run", resume=tmp_path / "run/checkpoint-3")
    assert resumed.course.moments == callback.course.moments
    assert resumed.course.steps == callback.course.steps
    for (name, one), (_, other) in zip(whole.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name

    with pytest.raises(CheckpointError, match="was written with other options"):
        tiny.trained(tiny.config(layer_wise="half"), tmp_path / "run", resume=tmp_path / "run/checkpoint-3")
    (tmp_path / "run/checkpoint-3/snndlft.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"snndlft.safetensors: cannot be gone on from"):
        tiny.trained(options, tmp_path / "run", resume=tmp_path / "run/checkpoint-3")


def test_what_cannot_be_trained_is_said_at_the_start(tmp_path):
    from transformers import Trainer, TrainingArguments

    from qinit.snndlft import DynamicLayers

    with pytest.raises(RecipeError, match="deltaT: 9 is beyond the 4 steps"):
        tiny.trained(tiny.config(deltaT=9, **tiny.PLAIN), tmp_path, steps=4)
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[])
    trainer = Trainer(tiny.base(), arguments, train_dataset=tiny.examples(), callbacks=[DynamicLayers(tiny.config())])
    with pytest.raises(RecipeError, match="has no AdaLoRA adapter; make it with adapt"):
        trainer.train()
