"""Tiny checkpoints beyond the families of tests.conftest, and what stock transformers says their layers see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qinit.plan.plan import Plan
from qinit.planner.make import make_plan
from qinit.recipe import make_recipe
from qinit.text.samples import Samples
from tests.conftest import FAMILIES, GATED, SMALL, make_checkpoint

SMALL_LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**SMALL, **SMALL_LAYERS, "use_parallel_residual": True}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**GATED, "head_dim": 32, "sliding_window": 8}),
    "gemma4": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            **{**GATED, "head_dim": 32, "global_head_dim": 32, "sliding_window": 8, "num_kv_shared_layers": 0},
            **{"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 256},
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "bert": ("BertConfig", "BertForMaskedLM", {**SMALL, **SMALL_LAYERS, "max_position_embeddings": 64}),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {**SMALL, "d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 2, "decoder_start_token_id": 0},
    ),
}


def make(directory: Path, family: str, **overrides: Any) -> Path:
    """Save a tiny float32 model of a family of tests.conftest, or of OTHERS."""
    if family in FAMILIES:
        return make_checkpoint(directory, family, "float32", **overrides)
    import transformers

    config_class, model_class, values = OTHERS[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**{**values, **overrides}))
    model.save_pretrained(directory)
    return directory


def plan_of(source: Path, **options: Any) -> Plan:
    options = {"calibration": "random", "format": "dense", "rank": 4, "group_size": 32, "device": "cpu", **options}
    return make_plan(make_recipe(model=str(source), **options), source, source.name)


def random_samples(count: int = 7, length: int = 12, seed: int = 0) -> Samples:
    tokens = torch.randint(3, 250, (count, length), generator=torch.Generator().manual_seed(seed))
    return Samples(tokens, None, "a test")


def padded(samples: Samples, lengths: list[int], padding: int = 0) -> Samples:
    """The same samples, cut to `lengths` and padded on the right."""
    mask = torch.arange(samples.tokens.shape[1]) < torch.tensor(lengths)[:, None]
    return Samples(samples.tokens.masked_fill(~mask, padding), mask, samples.origin)


def stock(plan: Plan) -> Any:
    """The whole model in float32, as a user loads it."""
    import transformers

    loader = getattr(transformers, plan.architecture.class_name)
    return loader.from_pretrained(plan.checkpoint.directory, dtype=torch.float32).eval()


class Trace:
    """What the modules `names` of a stock model get and give for some samples, one row per token (no padding)."""

    def __init__(self, model: Any, names: list[str], samples: Samples, **inputs: Any) -> None:
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
            model(input_ids=samples.tokens, attention_mask=mask, use_cache=False, **inputs)
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
