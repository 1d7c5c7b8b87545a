"""What stock transformers says that the layers of a model see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qinit.plan.plan import Plan
from qinit.stream.feeding import inputs_of
from qinit.text.samples import Samples

BLOCKS = {  # of families, `model.layers` for all others
    "gpt2": "transformer.h",
    "opt": "model.decoder.layers",
    "gpt_neox": "gpt_neox.layers",
    "bert": "bert.encoder.layer",
    "llava": "model.language_model.layers",
    "t5": "encoder.block",
    "bart": "model.encoder.layers",
}


def stock(plan: Plan) -> Any:
    """The whole model in float32, as a user loads it."""
    import transformers

    loader = getattr(transformers, plan.architecture.class_name)
    return loader.from_pretrained(plan.checkpoint.directory, dtype=torch.float32).eval()


@torch.no_grad()
def stock_states(plan: Plan, samples: Samples) -> list[torch.Tensor]:
    """What goes into each block of the stock model, and what comes out of the last one."""
    model = stock(plan)
    states: list[torch.Tensor] = []

    def keep(_module: Any, args: Any, kwargs: Any) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    def keep_output(_module: Any, _args: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    blocks = model.get_submodule(BLOCKS.get(plan.model_name, "model.layers"))
    for block in blocks:
        block.register_forward_pre_hook(keep, with_kwargs=True)
    blocks[-1].register_forward_hook(keep_output)
    mask = None if samples.mask is None else samples.mask.long()
    model(**inputs_of(model, samples.tokens, mask), use_cache=False)
    return states


class Trace:
    """What the modules `names` of a stock model get and give for some samples, one row per token (no padding)."""

    def __init__(self, model: Any, names: list[str], samples: Samples) -> None:
        self.inputs: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}
        kept = torch.ones_like(samples.tokens, dtype=torch.bool) if samples.mask is None else samples.mask

        def keep(name: str) -> Callable[..., None]:
            def hook(_module: Any, args: Any, kwargs: Any, output: Any) -> None:
                x = args[0] if args else kwargs["hidden_states"]
                y = output[0] if isinstance(output, tuple) else output
                self.inputs[name] = x.reshape(*kept.shape, -1)[kept]
                self.outputs[name] = y.reshape(*kept.shape, -1)[kept]

            return hook

        hooks = [model.get_submodule(name).register_forward_hook(keep(name), with_kwargs=True) for name in names]
        with torch.no_grad():
            mask = None if samples.mask is None else samples.mask.long()
            model(**inputs_of(model, samples.tokens, mask), use_cache=False)
        for hook in hooks:
            hook.remove()

    def hessian(self, name: str) -> torch.Tensor:
        return second_moment(self.inputs[name], self.inputs[name])


def second_moment(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """E[l r'], in float64 and returned in float32."""
    return (left.double().T @ right.double() / len(left)).float()


def oriented(weight: torch.Tensor, layer: Any) -> torch.Tensor:
    return weight.T if layer.target.module.transposed else weight


def assert_close(found: torch.Tensor, expected: torch.Tensor, rel: float = 1e-4) -> None:
    """Equal up to `rel` times the largest element."""
    torch.testing.assert_close(found, expected, rtol=0, atol=rel * float(expected.abs().max()) + 1e-12)
