"""Bases and factors of tiny models, as a polish starts from them."""

import torch

from qinit.solver.methods import METHODS
from qinit.solver.residual import as_loaded
from qinit.solver.solve import solve
from qinit.solver.spec import LayerSpec, seed_of

CPU = torch.device("cpu")


def tokens(samples=9, length=16, seed=0):
    return torch.randint(3, 256, (samples, length), generator=torch.Generator().manual_seed(seed))


def load(directory, kind="AutoModelForCausalLM"):
    import transformers

    return getattr(transformers, kind).from_pretrained(directory, dtype=torch.float32).eval()


def linears(model):
    """Return the weights [out, in] of what is quantized."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return {
        name: (module.weight.T if isinstance(module, Conv1D) else module.weight).detach().contiguous()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    }


def split(model, bits=2, rank=4, names=None):
    """Return the bases and factors of a data-free start."""
    bases, factors = {}, {}
    for name, weight in linears(model).items():
        if names is None or name in names:
            spec = LayerSpec(METHODS["eqft"], bits, 32, rank, 1)
            solution = solve(weight, spec, seed_of(name, 0))
            bases[name], factors[name] = as_loaded(solution.quantized, spec), solution.low_rank
    return bases, factors
