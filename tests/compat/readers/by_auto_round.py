"""DIR IDS OUT: saves the logits [tokens, vocabulary] that auto-round's layers in stock transformers make of a row of
ids, with s B A of the adapter added here: PEFT has no LoRA for these layers."""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

directory, ids, out = Path(sys.argv[1]), np.load(sys.argv[2]), sys.argv[3]
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float16)
torch.nn.Module.float(model)  # only the products' own rounding is left; transformers refuses `model.float()`
config = json.loads((directory / "eqft_init" / "adapter_config.json").read_text())
factors = load_file(directory / "eqft_init" / "adapter_model.safetensors")


def add(A, B, module, inputs, output):
    return output + config["lora_alpha"] / len(A) * linear(linear(inputs[0], A.float()), B.float())


kinds = set()
for name, A in factors.items():
    if name.endswith("lora_A.weight"):
        module = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        module.register_forward_hook(partial(add, A, factors[name.replace("lora_A", "lora_B")]))
        module.scales = module.scales.half()  # as they were loaded: s (q - z) is rounded to float16
        kinds.add(type(module).__module__)
assert all(kind.startswith("auto_round") for kind in kinds), kinds
with torch.no_grad():
    np.save(out, model.eval()(input_ids=torch.from_numpy(ids)[None]).logits[0].float().numpy())
