import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qinit.files.tensors import StoredTensor
from qinit.formats import FORMATS
from qinit.formats.gptq.reading import GRID, grid_of
from qinit.grids import GRIDS, Quantized
from qinit.source.targets import LinearModule, Target

GPTQ, INT = FORMATS["gptq"], GRIDS["int"]
OUT, IN, GROUP = 96, 128, 32


def make_target(name="model.layers.0.mlp.up_proj", transposed=False) -> Target:
    shape = (IN, OUT) if transposed else (OUT, IN)
    tensor = StoredTensor(f"{name}.weight", torch.bfloat16, shape, Path("model.safetensors"), 0)
    return Target(LinearModule(name, OUT, IN, transposed), tensor)


def random_codes(bits: int) -> Quantized:
    """Codes, zeros and scales over their whole ranges, zeros of 0 and of the top code included."""
    random = np.random.default_rng(bits)
    codes = torch.from_numpy(random.integers(0, 2**bits, (OUT, IN), dtype=np.uint8))
    zeros = torch.from_numpy(random.integers(0, 2**bits, (OUT, IN // GROUP), dtype=np.uint8))
    zeros[0], zeros[1] = 0, 2**bits - 1
    scales = torch.from_numpy(random.uniform(1e-4, 1, (OUT, IN // GROUP))).half().float()
    return Quantized(bits, GROUP, codes, scales, zeros)


def read_stream(words: np.ndarray, bits: int) -> np.ndarray:
    """Read down each column a little-endian stream of `bits`-bit numbers from 32-bit words."""
    bit = (words.view(np.uint32)[:, None, :] >> np.arange(32, dtype=np.uint32)[None, :, None]) & 1
    numbers = bit.reshape(-1, bits, words.shape[1])
    return (numbers << np.arange(bits, dtype=np.uint32)[None, :, None]).sum(1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_an_independent_reading_of_the_format_gives_q(bits):
    q = random_codes(bits)
    stored = {name.rsplit(".", 1)[-1]: t.numpy() for name, t in GPTQ.encode(make_target(), q, INT).items()}
    codes = read_stream(stored["qweight"], bits)  # [in, out]
    zeros = read_stream(np.ascontiguousarray(stored["qzeros"].T), bits).T  # [groups, out]
    group = stored["g_idx"]
    values = stored["scales"].astype(np.float32)[group] * (codes.astype(np.float32) - zeros[group])
    assert np.array_equal(values.T, INT.dequantize(q).numpy())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_decoding_gives_the_solvers_q_back_bit_by_bit(bits):
    q, target = random_codes(bits), make_target()
    stored = GPTQ.encode(target, q, INT)
    assert not list(GPTQ.flaws(target, stored, GROUP))
    found = GPTQ.decode(target, stored, bits, GROUP)
    assert found.dtype == torch.float32
    assert torch.equal(found, INT.dequantize(q))


def test_a_group_index_out_of_place_is_named():
    target = make_target()
    stored = GPTQ.encode(target, random_codes(2), INT)
    stored[target.prefix + "g_idx"][[5, 70]] = torch.tensor([99, 0], dtype=torch.int32)
    expected = (target.prefix + "g_idx", "0 at input 5", "99 (2 such inputs)")
    assert list(GPTQ.flaws(target, stored, GROUP)) == [expected]


def test_a_scale_that_no_search_finds_is_named():
    target = make_target()
    stored = GPTQ.encode(target, random_codes(2), INT)
    stored[target.prefix + "scales"][1, :2] = torch.tensor([0.0, -0.5])
    assert list(GPTQ.flaws(target, stored, GROUP)) == [(target.prefix + "scales", "scales above 0", "2 that are not")]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_is_stored_is_what_was_announced(bits, transposed):
    target = make_target(transposed=transposed)  # a Conv1D's weight is packed as a Linear's is
    stored = GPTQ.encode(target, random_codes(bits), INT)
    specs = GPTQ.specs(target, bits, GROUP)
    assert [(s.name, s.dtype, s.shape) for s in specs] == [(n, t.dtype, t.shape) for n, t in stored.items()]
    assert all(tensor.is_contiguous() for tensor in stored.values())
    assert stored[target.prefix + "g_idx"].tolist() == [k // GROUP for k in range(IN)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptqmodel_unpacks_the_same_numbers(bits):
    pytest.importorskip("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    q = random_codes(bits)
    module = TorchLinear(bits, GROUP, sym=False, desc_act=False, in_features=IN, out_features=OUT, bias=False)
    target = make_target()
    stored = GPTQ.encode(target, q, INT)
    with torch.no_grad():
        for name in ("qweight", "qzeros", "scales", "g_idx"):
            buffer = getattr(module, name)
            assert buffer.shape == stored[target.prefix + name].shape
            buffer.copy_(stored[target.prefix + name])
    # float16 is the kernel's type: s (q - z) is rounded once.
    expected = GPTQ.decode(target, stored, bits, GROUP).half().float()
    torch.testing.assert_close(module.dequantize_weight().T.float(), expected, rtol=2.0**-11, atol=0)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptqmodel_packs_to_the_same_words(bits):
    pytest.importorskip("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    q = random_codes(bits)
    linear = torch.nn.Linear(IN, OUT, bias=False)
    linear.weight.data = INT.dequantize(q)
    module = TorchLinear(bits, GROUP, sym=False, desc_act=False, in_features=IN, out_features=OUT, bias=False)
    stored = GPTQ.encode(make_target(), q, INT)
    g_idx = torch.arange(IN, dtype=torch.int32) // GROUP
    module.pack_original(linear, q.scales, q.zeros.float(), g_idx=g_idx)
    assert torch.equal(module.qweight, stored["model.layers.0.mlp.up_proj.qweight"])
    assert torch.equal(module.qzeros, stored["model.layers.0.mlp.up_proj.qzeros"])


def test_shapes_and_grids_that_it_cannot_hold_are_named_with_the_reason():
    def module(out_features, in_features):
        return LinearModule("x", out_features, in_features, transposed=False)

    assert GPTQ.cannot_hold_shape(module(96, 128), 64) is None
    assert "96 x 100 is not divisible by 32" in GPTQ.cannot_hold_shape(module(96, 100), 64)
    assert "172 x 64 is not divisible by 32" in GPTQ.cannot_hold_shape(module(172, 64), 64)
    assert "96 inputs are not divisible by the group size 64" in GPTQ.cannot_hold_shape(module(64, 96), 64)
    assert GPTQ.cannot_hold("int", 2, 64) is None
    assert "--format dense" in GPTQ.cannot_hold("nf", 2, 64)
    assert "found 48" in GPTQ.cannot_hold("int", 2, 48)


def selected(config: dict, names: list[str]) -> list[str]:
    """The loader's rule: a module is quantized if its name ends with a selector."""
    (selectors,) = config["modules_in_block_to_quantize"]
    return [name for name in names if any(name.endswith(ending) for ending in selectors)]


LAYERS = [f"model.layers.{i}.{m}" for i in range(12) for m in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]


@pytest.mark.parametrize(
    "kept",
    [
        [],
        ["model.layers.1.mlp.down_proj"],
        ["model.layers.11.mlp.down_proj", "model.layers.0.self_attn.q_proj"],
        [name for name in LAYERS if name.endswith("down_proj")],
    ],
    ids=["nothing", "one", "two", "all of a kind"],
)
def test_the_selectors_choose_exactly_the_quantized_modules(kept):
    quantized = [name for name in LAYERS if name not in kept]
    config = GPTQ.quantization_config(dict.fromkeys(quantized, (2, 64)), kept)
    assert selected(config, LAYERS) == quantized
    skipped = [pattern.removeprefix("-:") for pattern in config.get("dynamic", {})]
    assert [name for name in LAYERS if any(re.match(pattern, name) for pattern in skipped)] == sorted(
        kept, key=LAYERS.index
    )


def test_a_selector_of_one_name_does_not_catch_another_that_ends_alike():
    quantized = ["model.layers.0.mlp.proj"]
    kept = ["model.layers.0.mlp.up_proj", "model.layers.0.deep.mlp.proj"]
    config = GPTQ.quantization_config(dict.fromkeys(quantized, (2, 64)), kept)
    assert selected(config, quantized + kept) == quantized


def test_the_config_says_what_the_loader_has_to_know():
    config = GPTQ.quantization_config(dict.fromkeys(LAYERS, (3, 128)), [])
    expected = {
        "quant_method": "gptq",
        "bits": 3,
        "group_size": 128,
        "desc_act": False,
        "sym": False,
        "checkpoint_format": "gptq_v2",
        "lm_head": False,
        "backend": "gptq_torch",
    }
    assert expected.items() <= config.items()
    assert "dynamic" not in config
    assert "block_name_to_quantize" not in config  # model.layers is found by itself


MIXED = {name: ((2, 3, 4, 2)[i % 4], 64) for i, name in enumerate(LAYERS)} | {LAYERS[11]: (8, 64)}


def test_the_most_frequent_width_is_the_base_and_the_others_are_listed_by_name():
    config = GPTQ.quantization_config(MIXED, ["model.layers.0.mlp.gate_proj"])
    assert config["bits"] == 2
    assert config["dynamic"].pop(r"-:^model\.layers\.0\.mlp\.gate_proj$") == {}
    expected = {f"+:^{re.escape(name)}$": {"bits": bits} for name, (bits, _) in MIXED.items() if bits != 2}
    assert config["dynamic"] == expected
    one_width = GPTQ.quantization_config(dict.fromkeys(MIXED, (2, 64)), ["model.layers.0.mlp.gate_proj"])
    assert config | {"dynamic": None} == one_width | {"dynamic": None}


@pytest.mark.parametrize(
    ("widths", "base"), [((3, 2, 2, 3), 2), ((8, 4), 4), ((4, 8, 8), 8), ((2, 4, 3, 3, 4), 3), ((3,), 3)]
)
def test_of_equally_frequent_widths_the_smaller_is_the_base(widths, base):
    assert GPTQ.quantization_config({n: (b, 64) for n, b in zip(LAYERS, widths, strict=False)}, [])["bits"] == base


def test_group_sizes_may_differ_too():
    grids = dict(zip(LAYERS, ((2, 64), (2, 32), (3, 64), (3, 32), (2, 64)), strict=False))
    config = GPTQ.quantization_config(grids, [])
    assert (config["bits"], config["group_size"]) == (2, 64)
    assert list(config["dynamic"].values()) == [{"group_size": 32}, {"bits": 3}, {"bits": 3, "group_size": 32}]
    assert {name: grid_of(name, config) for name in grids} == grids


def test_gptqmodel_reads_width_and_group_size_of_every_module():
    pytest.importorskip("gptqmodel")
    from gptqmodel.quantization.config import dynamic_get

    # Names of which one begins with another, or which a dot that is not escaped would catch.
    alike = {"model.layers.1.mlp.up_proj_2": 8, "xmodel.layers.1.mlp.up_proj": 2, "model.layers.1.mlp_up_proj": 3}
    grids = MIXED | {name: (bits, 32) for name, bits in alike.items()}
    kept = ["model.layers.1.mlp.gate_proj", "model.layers.10.mlp.gate_proj"]
    config = GPTQ.quantization_config(grids, kept)
    dynamic = config["dynamic"]
    found = {name: tuple(dynamic_get(dynamic, name, key, config[key]) for key in GRID) for name in grids}
    assert found == grids
    assert all(dynamic_get(dynamic, name) is False for name in kept)
    assert dynamic_get(dynamic, "model.layers.100.mlp.gate_proj") is None


@pytest.mark.parametrize(
    ("names", "block"),
    [
        (["model.decoder.layers.0.fc1", "model.decoder.layers.1.fc1"], None),
        (["transformer.h.0.attn.c_attn"], None),
        (["backbone.blocks.0.fc1", "backbone.blocks.1.fc1"], "backbone.blocks"),
    ],
)
def test_a_block_that_the_loader_does_not_know_is_named(names, block):
    assert GPTQ.quantization_config(dict.fromkeys(names, (2, 64)), []).get("block_name_to_quantize") == block


class TestCodes:
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_they_are_those_that_were_encoded(self, bits):
        q, target = random_codes(bits), make_target()
        stored = GPTQ.encode(target, q, INT)
        found = GPTQ.codes(target, stored, bits, GROUP)
        assert (found.bits, found.group_size) == (bits, GROUP)
        assert found.codes.dtype == found.zeros.dtype == torch.uint8
        assert found.scales.dtype == torch.float32
        for name in ("codes", "scales", "zeros"):
            assert torch.equal(getattr(found, name), getattr(q, name))
            assert getattr(found, name).is_contiguous()
        again = GPTQ.encode(target, found, INT)
        assert again.keys() == stored.keys()
        assert all(torch.equal(again[name], stored[name]) for name in stored)

    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_other_scales_for_the_same_codes(self, bits):
        q, target = random_codes(bits), make_target()
        stored = GPTQ.encode(target, q, INT)
        other = replace(q, scales=(q.scales * 1.01).half().float())
        changed = GPTQ.scales(target, other.scales)
        wanted = GPTQ.encode(target, other, INT)
        assert [name for name in stored if not torch.equal(stored[name], wanted[name])] == list(changed)
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in changed.items())
        assert all((t.dtype, t.shape) == (stored[n].dtype, stored[n].shape) for n, t in changed.items())
        assert torch.equal(GPTQ.decode(target, {**stored, **changed}, bits, GROUP), INT.dequantize(other))
