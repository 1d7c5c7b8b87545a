"""Ranks by AdaLoRA's importance: PEFT's RankAllocator, which passes over what has no gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.adalora.layer import RankAllocator
from torch import nn

from qinit.snndlft.layers import Layer


class _WithGradient:
    """Of a model the parameters that have a gradient: all that RankAllocator.update_ipt asks for."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, value) for name, value in self._model.named_parameters() if value.grad is not None)


class LayerwiseAllocator(RankAllocator):
    """RankAllocator for a model some of whose layers wait: these keep the importance that they had."""

    def update_ipt(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if "lora_" in name and self.adapter_name in name and name not in self.ipt:
                for kept in (self.ipt, self.exp_avg_ipt, self.exp_avg_unc):
                    kept[name] = torch.zeros_like(parameter)
        super().update_ipt(_WithGradient(model))

    def importance(self, layer: Layer) -> float:
        """Return the importance s_i of a layer's triplets, summed up: of each that of its Lambda, and the mean over its
        row of Q and its column of P; of each value smoothed |w grad w| times its smoothed variation (AdaLoRA,
        equations 8 to 11). A masked triplet counts too, as it may come back."""
        total = 0.0
        for module in layer.modules:
            Q, L, P = (self._element_score(f"{module}.lora_{part}.{self.adapter_name}") for part in "AEB")
            total += float(L.sum() + Q.mean(1).sum() + P.mean(0).sum())
        return total

    def state(self) -> dict[str, torch.Tensor]:
        """Return what it has seen, to go on from."""
        kept = {"ipt": self.exp_avg_ipt, "unc": self.exp_avg_unc}
        return {f"{kind}.{name}": value for kind, values in kept.items() for name, value in values.items()}

    def restore(self, tensors: dict[str, torch.Tensor], model: nn.Module) -> None:
        """Go on from `state`. Raises KeyError for that of another model."""
        self.reset_ipt()
        for name, parameter in model.named_parameters():
            if "lora_" in name and self.adapter_name in name:
                self.ipt[name] = torch.zeros_like(parameter)
                self.exp_avg_ipt[name] = tensors[f"ipt.{name}"].to(parameter.device)
                self.exp_avg_unc[name] = tensors[f"unc.{name}"].to(parameter.device)

    def schedule(self, model: Any, step: int) -> bool:
        """Do what AdaLoraModel.update_and_allocate does after optimizer step number `step`, counted from 1, until the
        ranks are fixed; True if they were allocated anew."""
        last = self.peft_config.total_step - self.peft_config.tfinal
        _, pattern = self.update_and_allocate(model, step, force_mask=step == last)
        return pattern is not None
