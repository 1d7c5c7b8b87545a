"""Peers against the code that their authors or PEFT released, and run by run against their papers.

PEFT's LoftQ has no CPU path: `loftq_init` and `_loftq_init_new` move each weight to a GPU whatever it lies on. What is
compared with here is that code as it is installed, with this one choice of a device changed.
"""

import inspect
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from qinit.solver.residual import as_loaded
from qinit.solver.solve import solve
from tests.helpers import quantize
from tests.layers import KINDS, of_kind
from tests.models import make_checkpoint
from tests.qinit.solver.papers import loftq, qpissa
from tests.qinit.solver.test_solve import product, spec
from tests.stock import delta, dense_weight, load, lora_modules

RANK = 8
HARD_CODED = '"xpu" if is_xpu_available() else "cuda"'


def bitsandbytes():
    return pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes").functional


def nf4(weight):
    """bitsandbytes' NF4 of a matrix: its codes, absmax and values."""
    functional = bitsandbytes()
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).reshape(weight.shape)
    return codes, state.absmax, functional.dequantize_4bit(packed, state)


def on_the_cpu(function):
    """A released function that computes on the CPU instead of a GPU, and is the same otherwise."""
    source = inspect.getsource(function)
    assert source.count(HARD_CODED) == 1
    names = dict(vars(inspect.getmodule(function)))
    exec(source.replace(HARD_CODED, '"cpu"'), names)
    return names[function.__name__]


def adapted(weight, **options):
    """PEFT's LoRA on one linear layer with this weight."""
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model[0].weight.data = weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = get_peft_model(model, LoraConfig(r=RANK, target_modules=["0"], **options))
    return found.base_model.model[0]


def close(found, expected, limit):
    """Within `limit` of the expected matrix, in the Frobenius norm."""
    assert float((found.double() - expected.double()).norm()) <= limit * float(expected.double().norm())


class TestQLoRA:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("kind", KINDS)
    def test_codes_and_absmax_are_bitsandbytes_bit_by_bit(self, kind, dtype):
        weight = of_kind(kind, 128, 512).to(dtype).float()
        codes, absmax, values = nf4(weight)
        solution = solve(weight, spec("qlora", 4, rank=RANK))
        assert torch.equal(solution.quantized.codes, codes)
        assert torch.equal(solution.quantized.scales.flatten(), absmax)
        # The levels are the same formula's, theirs printed with fewer digits.
        torch.testing.assert_close(as_loaded(solution.quantized, spec("qlora", 4)), values, rtol=1e-6, atol=0)

    def test_a_run_s_base_is_what_bitsandbytes_makes_of_the_checkpoint(self, tmp_path):
        source = make_checkpoint(tmp_path / "source", dtype="float32", hidden_size=128)
        quantize(source, tmp_path / "run", method="qlora", bits=4, format="dense")
        original, modules = self.weights(source), lora_modules(load(tmp_path / "run"))
        for name, module in modules.items():
            torch.testing.assert_close(dense_weight(module.base_layer), nf4(original[name])[2], rtol=1e-6, atol=1e-9)
            assert not delta(module).any()  # B is zero

    def weights(self, source):
        from safetensors.torch import load_file

        return {name.removesuffix(".weight"): value for name, value in load_file(source / "model.safetensors").items()}


class TestPiSSA:
    @pytest.mark.parametrize("alpha", [RANK, 4 * RANK])
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_low_rank_part_is_peft_s(self, kind, alpha):
        weight = of_kind(kind)
        theirs = adapted(weight, init_lora_weights="pissa", lora_alpha=alpha)
        solution = solve(weight, spec("qpissa", 2, rank=RANK))
        close(product(solution), delta(theirs), 1e-5)
        A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
        scale = theirs.scaling["default"] ** 0.5
        for ours, other in ((solution.low_rank.A, scale * A), (solution.low_rank.B.T, scale * B.T)):
            torch.testing.assert_close(ours.norm(dim=1), other.norm(dim=1), rtol=1e-4, atol=0)  # the same split

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_base_is_the_nf4_of_peft_s_residual(self, kind):
        weight = of_kind(kind)
        theirs = adapted(weight, init_lora_weights="pissa", lora_alpha=RANK)
        codes, _, values = nf4(theirs.base_layer.weight.data)
        solution = solve(weight, spec("qpissa", 4, rank=RANK))
        assert (solution.quantized.codes != codes).float().mean() <= 1e-3  # the residuals differ in their last bits
        close(as_loaded(solution.quantized, spec("qpissa", 4)), values, 1e-2)


class TestLoftQ:
    @pytest.mark.parametrize("rounds", [1, 5])
    @pytest.mark.parametrize("kind", KINDS)
    def test_peft_s_initialization_gives_the_same_base_and_adapter(self, kind, rounds, monkeypatch):
        bitsandbytes()
        from peft import LoftQConfig
        from peft.tuners.lora import layer
        from peft.utils.loftq_utils import loftq_init

        monkeypatch.setattr(layer, "loftq_init", on_the_cpu(loftq_init))
        weight = of_kind(kind)
        config = LoftQConfig(loftq_bits=4, loftq_iter=rounds)
        theirs = adapted(weight, init_lora_weights="loftq", loftq_config=config, lora_alpha=RANK)
        solution = solve(weight, spec("loftq", 4, rank=RANK, iterations=rounds))
        base, low_rank = theirs.base_layer.weight.data, delta(theirs)
        changed = (as_loaded(solution.quantized, spec("loftq", 4)) - base).abs() > 1e-6
        assert changed.float().mean() <= (0 if rounds == 1 else 0.01)
        close(product(solution), low_rank, 1e-4 if rounds == 1 else 0.05)
        error = float((weight.double() - base - low_rank).norm() / weight.double().norm())
        assert solution.error == pytest.approx(error, rel=1e-5 if rounds == 1 else 1e-3)

    def test_peft_s_replacement_in_a_model_loaded_by_bitsandbytes_is_one_round(self, tmp_path, monkeypatch):
        bitsandbytes()
        from peft import LoraConfig, get_peft_model, replace_lora_weights_loftq
        from peft.utils import loftq_utils
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        source = make_checkpoint(tmp_path / "source", dtype="float32", num_hidden_layers=1)
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        base = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, device_map={"": "cpu"})
        model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
        monkeypatch.setattr(loftq_utils, "_loftq_init_new", on_the_cpu(loftq_utils._loftq_init_new))
        replace_lora_weights_loftq(model, model_path=str(source / "model.safetensors"))
        original = load_file(source / "model.safetensors")
        modules = lora_modules(model)
        assert len(modules) == 7
        for name, module in modules.items():
            solution = solve(original[f"{name}.weight"], spec("loftq", 4, rank=RANK, iterations=1))
            close(product(solution), delta(module), 1e-4)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, where PEFT's LoftQ runs as it is")
    def test_as_it_is_released_it_does_not_run_on_a_cpu(self):
        bitsandbytes()
        from peft.utils.loftq_utils import loftq_init

        with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
            loftq_init(of_kind("normal"), num_bits=4, reduced_rank=RANK, num_iter=1)


@pytest.mark.parametrize(("method", "paper"), [("loftq", loftq), ("qpissa", qpissa)])
def test_a_run_as_the_stock_loaders_load_it_is_the_paper_s_algorithm(method, paper, tmp_path):
    """In float64, with a full SVD, adapter scale and all."""
    from safetensors.torch import load_file

    source = make_checkpoint(tmp_path / "source", dtype="float32", num_hidden_layers=1)
    quantize(source, tmp_path / "run", method=method, bits=3, rank=RANK, iter=None, format="dense", lora_alpha=20)
    original = load_file(source / "model.safetensors")
    for name, module in lora_modules(load(tmp_path / "run")).items():
        weight = original[f"{name}.weight"].double().numpy()
        quantized, low_rank = paper(weight, 3, RANK)
        changed = np.abs(dense_weight(module.base_layer).numpy() - quantized) > 1e-6
        assert changed.mean() <= (0.01 if method == "loftq" else 1e-3)
        close(delta(module), torch.from_numpy(low_rank), 0.05)
