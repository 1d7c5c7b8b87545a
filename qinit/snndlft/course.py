"""The course of a training: what is decided after each step, and what of it is kept to go on from and to report."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from qinit.snndlft.allocation import LayerwiseAllocator
from qinit.snndlft.config import SnnDlftConfig
from qinit.snndlft.importance import LayerGradients, choose
from qinit.snndlft.layers import layers_of, state_bytes, train_only
from qinit.snndlft.spikes import spike_rates


@dataclass(frozen=True)
class Moment:
    """Where a training stands after `step`: the mean loss since the last one (AdaLoRA's regularizer in it), the layers
    that train, each layer's triplets in use, how many values train (`trainable`: with all init_r triplets of a layer;
    `kept`: with those that the mask leaves), each layer's spike rate since the last one, and the optimizer's bytes."""

    step: int
    loss: float
    trained: tuple[str, ...]
    ranks: dict[str, int]
    trainable: int
    kept: int
    rates: dict[str, float]
    state_bytes: int


class Course:
    """The state of a training of `tuner`, the AdaLoraModel, under its optimizer."""

    def __init__(self, config: SnnDlftConfig, tuner: Any, optimizer: Any) -> None:
        self.config, self.tuner, self.optimizer = config, tuner, optimizer
        self.adapter = tuner.trainable_adapter_name
        self.allocator = LayerwiseAllocator(tuner.model, tuner.peft_config[self.adapter], self.adapter)
        self.layers = layers_of(tuner.model, self.adapter)
        self.gradients = LayerGradients(config.beta1, config.beta2)
        self.trained = [layer.name for layer in self.layers]
        self.steps = dict.fromkeys(self.trained, 0)  # that each layer has trained
        self.pattern: dict[str, list[bool]] | None = None  # once the ranks are fixed
        self.moments: list[Moment] = []

    @property
    def last(self) -> int:
        """The step after which ranks and layers are fixed."""
        return self.allocator.peft_config.total_step - self.config.tfinal

    def after_step(self, step: int) -> None:
        """Allocate ranks and choose layers after optimizer step number `step`, counted from 1, while the gradients are
        there."""
        for name in self.trained:
            self.steps[name] += 1
        if step > self.last:
            self.allocator.mask_using_rank_pattern(self.tuner.model, self.pattern)
            return
        self.gradients.update(self.layers)
        allocated = self.allocator.schedule(self.tuner.model, step)
        if allocated and self.config.layer_wise != "all":
            self._choose()
        if step == self.last:
            self.pattern = self.in_use()

    def _choose(self) -> None:
        triplets = {layer.name: self.allocator.importance(layer) for layer in self.layers}
        self.trained = choose(self.gradients.mixed(triplets), self.config.layer_wise)
        train_only(self.layers, self.trained, self.optimizer)

    def in_use(self) -> dict[str, list[bool]]:
        """Return which triplets of each module have a Lambda that is not zero, by the name of its Lambda: what the rest
        is left out by when the adapter is saved, which changes no output."""
        modules = (pair for layer in self.layers for pair in layer.modules.items())
        return {
            f"{module}.lora_E.{self.adapter}": (parts["lora_E"] != 0).flatten().tolist() for module, parts in modules
        }

    def note(self, step: int, loss: float) -> Moment:
        """Keep where the training stands."""
        chosen = [layer for layer in self.layers if layer.name in self.trained]
        ranks = {layer.name: layer.ranks for layer in self.layers}
        moment = Moment(
            step=step,
            loss=loss,
            trained=tuple(self.trained),
            ranks=ranks,
            trainable=sum(layer.size for layer in chosen),
            kept=sum(layer.size_in_use for layer in chosen),
            rates=self._rates(),
            state_bytes=state_bytes(self.optimizer),
        )
        self.moments.append(moment)
        return moment

    def _rates(self) -> dict[str, float]:
        """Return the mean spike rate of each layer's modules, and begin to count anew."""
        found = spike_rates(self.tuner.model, reset=True)
        means = {}
        for layer in self.layers:
            rates = [found[module] for module in layer.modules if module in found]
            if rates:
                means[layer.name] = sum(rates) / len(rates)
        return means

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return all that a training needs to go on, as tensors and as JSON."""
        values = {
            "config": self.config.model_dump(mode="json"),
            "trained": self.trained,
            "steps": self.steps,
            "pattern": self.pattern,
            "gradients": self.gradients.to_json(),
            "moments": [asdict(moment) for moment in self.moments],
        }
        return self.allocator.state(), values

    def restore(self, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        """Go on from `state`. Raises KeyError for that of another model."""
        self.allocator.restore(tensors, self.tuner.model)
        self.gradients.magnitude, self.gradients.uncertainty = values["gradients"].values()
        self.trained, self.steps, self.pattern = values["trained"], values["steps"], values["pattern"]
        self.moments = [Moment(**{**each, "trained": tuple(each["trained"])}) for each in values["moments"]]
        train_only(self.layers, self.trained, self.optimizer)
