import json
import math

import pytest
import torch

from qinit.verification.findings import Finding
from qinit.verification.verify import verify
from tests.models import FAMILIES, make_checkpoint
from tests.stock import (
    delta,
    dense_twin,
    dense_weight,
    load,
    load_base,
    logits,
    lora_modules,
    quantize,
    relative,
    solved,
    source_weight,
)

pytest.importorskip("gptqmodel", reason="pip install 'qinit[gptq]'")
pytest.importorskip("optimum", reason="pip install 'qinit[gptq]'")

FORMATS = ("gptq", "dense")
# A GPTQ kernel computes s (q - z) in float16, once rounded; nothing else may differ from Q.
GPTQ_ROUNDING = 2.0**-11


def assert_weights_are_q(plan, model, rtol):
    expected = solved(plan)
    modules = lora_modules(model)
    for name, (_, q, _) in expected.items():
        torch.testing.assert_close(dense_weight(modules[name].base_layer), q, rtol=rtol, atol=1e-7)


def assert_errors_are_the_reported_ones(plan, report, model, rel):
    modules = lora_modules(model)
    for row in report.layers:
        weight = source_weight(plan, row.name)
        module = modules[row.name]
        rest = weight - dense_weight(module.base_layer)
        if row.kept:
            assert not rest.any()
            assert not delta(module).any()
            continue
        assert float(rest.norm() / weight.norm()) == pytest.approx(row.error_start, rel=rel)
        assert float((rest - delta(module)).norm() / weight.norm()) == pytest.approx(row.error, rel=rel)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """Name, source checkpoint, and a directory for results."""
    directory = tmp_path_factory.mktemp(request.param)
    return request.param, make_checkpoint(directory / "source", request.param), directory


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_family_computes_with_q_plus_the_adapter(family, fmt):
    name, source, directory = family
    plan, report = quantize(source, directory / fmt, bits=2, format=fmt)
    model = load(directory / fmt)
    assert len(lora_modules(model)) == len(plan.layers) == 2 * {"phi3": 4, "opt": 6, "gpt2": 4}.get(name, 7)
    assert_weights_are_q(plan, model, rtol=GPTQ_ROUNDING if fmt == "gptq" else 0)
    assert_errors_are_the_reported_ones(plan, report, model, rel=1e-3)
    assert relative(logits(model), logits(dense_twin(source, model))) < 1e-4


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_at_every_width_is_q_to_the_last_bit_before_float16(llama, tmp_path, bits):
    plan, report = quantize(llama, tmp_path / "out", bits=bits, format="gptq")
    model = load(tmp_path / "out")
    for name, (codes, q, _) in solved(plan).items():
        module = lora_modules(model)[name].base_layer
        assert module.bits == bits
        groups = codes.scales.half().T
        assert torch.equal(module.scales, groups)
        # The kernel's arithmetic, written out: float16 times a small integer, rounded to float16.
        zero = codes.zeros.float().repeat_interleave(32, 1)
        expected = (codes.scales.repeat_interleave(32, 1) * (codes.codes.float() - zero)).half().float()
        assert torch.equal(dense_weight(module), expected)
        torch.testing.assert_close(expected, q, rtol=GPTQ_ROUNDING, atol=1e-7)
    # At 8 bits that one rounding is visible beside an error of half a percent.
    assert_errors_are_the_reported_ones(plan, report, model, rel=0.02 if bits == 8 else 1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dense_is_exactly_the_solver_s_q_in_every_dtype(tmp_path, dtype):
    source = make_checkpoint(tmp_path / "source", "llama", dtype)
    plan, report = quantize(source, tmp_path / "out", bits=3, format="dense")
    model = load(tmp_path / "out", dtype=getattr(torch, dtype))
    assert_weights_are_q(plan, model, rtol=0)
    assert_errors_are_the_reported_ones(plan, report, model, rel=1e-5)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"lora_alpha": 32.0}, 4.0),
        ({"lora_alpha": 3.0}, 3 / 8),
        ({"use_rslora": True}, math.sqrt(8)),
        ({"use_rslora": True, "lora_alpha": 5.0}, 5 / math.sqrt(8)),
    ],
)
def test_peft_s_scale_does_not_undo_the_initialization(llama, tmp_path, fmt, options, scale):
    plan, report = quantize(llama, tmp_path / "out", bits=2, format=fmt, **options)
    model = load(tmp_path / "out")
    assert all(module.scaling["default"] == pytest.approx(scale) for module in lora_modules(model).values())
    assert_errors_are_the_reported_ones(plan, report, model, rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_alpha": 24.0}])
@pytest.mark.parametrize("fmt", FORMATS)
def test_ranks_above_a_layer_s_shape_are_lowered_and_keep_the_scale(tmp_path, fmt, options):
    source = make_checkpoint(tmp_path / "source", "llama", num_key_value_heads=1, head_dim=32, num_attention_heads=2)
    plan, report = quantize(source, tmp_path / "out", bits=2, rank=48, format=fmt, **options)
    ranks = {layer.target.name.rsplit(".", 1)[-1]: layer.rank for layer in plan.layers}
    assert (ranks["k_proj"], ranks["up_proj"]) == (32, 48)
    model = load(tmp_path / "out")
    scale = plan.recipe.lora_scale
    assert all(module.scaling["default"] == pytest.approx(scale) for module in lora_modules(model).values())
    for row in report.layers:
        module = lora_modules(model)[row.name]
        assert module.r["default"] == row.rank
        rest = source_weight(plan, row.name) - dense_weight(module.base_layer) - delta(module)
        expected = row.error * source_weight(plan, row.name).norm()
        torch.testing.assert_close(rest.norm(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("family_name", ["llama", "gpt2"])
def test_merging_into_a_dense_base_gives_q_plus_the_scaled_product(tmp_path, family_name):
    source = make_checkpoint(tmp_path / "source", family_name, "float32")
    plan, _ = quantize(source, tmp_path / "out", bits=2, format="dense", lora_alpha=24.0)
    merged = load(tmp_path / "out").merge_and_unload()
    for name, (_, q, low_rank) in solved(plan).items():
        torch.testing.assert_close(dense_weight(merged.get_submodule(name)), q + low_rank, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_sharded_checkpoint_gives_the_same_bytes_as_a_single_file(tmp_path, fmt):
    single = make_checkpoint(tmp_path / "single", "llama")
    sharded = make_checkpoint(tmp_path / "sharded", "llama", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    quantize(single, tmp_path / "a", format=fmt)
    quantize(sharded, tmp_path / "b", format=fmt, max_shard_size="40KB")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    one, other = load(tmp_path / "a").state_dict(), load(tmp_path / "b").state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("family_name", ["gpt2", "opt", "llama"])
def test_names_without_the_base_model_s_prefix_load_into_the_causal_model(tmp_path, family_name, fmt):
    """As openai-community/gpt2: saved from GPT2Model, but config.json names GPT2LMHeadModel."""
    base_class = {"gpt2": "GPT2Model", "opt": "OPTModel", "llama": "LlamaModel"}[family_name]
    causal_class = FAMILIES[family_name][1]
    source = make_checkpoint(tmp_path / "source", family_name, model_class=base_class, tie_word_embeddings=True)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": [causal_class]}))
    plan, _ = quantize(source, tmp_path / "out", format=fmt)
    assert not any(name.startswith(("transformer.", "model.")) for name in plan.checkpoint.tensors)
    model = load(tmp_path / "out")
    assert_weights_are_q(plan, model, rtol=GPTQ_ROUNDING)
    assert relative(logits(model), logits(dense_twin(source, model))) < 1e-4


@pytest.mark.parametrize("fmt", FORMATS)
def test_names_that_the_loader_converts_are_kept_for_it_to_convert(tmp_path, fmt):
    source = make_checkpoint(tmp_path / "source", "llava")
    plan, _ = quantize(source, tmp_path / "out", format=fmt)
    assert all(layer.target.tensor.name != f"{layer.target.name}.weight" for layer in plan.layers)
    assert not [event for event in verify(tmp_path / "out", source) if isinstance(event, Finding)]
    model = load(tmp_path / "out", auto_class="AutoModelForImageTextToText")
    assert_weights_are_q(plan, model, rtol=GPTQ_ROUNDING)
    twin = dense_twin(source, model, auto_class="AutoModelForImageTextToText")
    assert relative(logits(model), logits(twin)) < 1e-4


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("family_name", ["gpt2", "llama"])
def test_a_base_model_without_a_head_loads_as_one(tmp_path, family_name, fmt):
    base_class = {"gpt2": "GPT2Model", "llama": "LlamaModel"}[family_name]
    source = make_checkpoint(tmp_path / "source", family_name, model_class=base_class)
    plan, _ = quantize(source, tmp_path / "out", format=fmt)
    model = load(tmp_path / "out", auto_class="AutoModel")
    assert_weights_are_q(plan, model, rtol=GPTQ_ROUNDING)
    assert relative(logits(model), logits(dense_twin(source, model, "AutoModel"))) < 1e-4


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("tied", [False, True])
def test_heads_stay_as_they_are_tied_or_not(tmp_path, fmt, tied):
    source = make_checkpoint(tmp_path / "source", "llama", tie_word_embeddings=tied)
    plan, _ = quantize(source, tmp_path / "out", format=fmt)
    assert not any("head" in layer.target.name or "embed" in layer.target.name for layer in plan.layers)
    loaded, original = load_base(tmp_path / "out"), load_base(source)
    head, embedding = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
    assert (head.data_ptr() == embedding.data_ptr()) is tied
    assert torch.equal(head, original.get_output_embeddings().weight)
    assert torch.equal(embedding, original.get_input_embeddings().weight)


def test_layers_that_gptq_cannot_hold_stay_dense_and_start_as_plain_lora(tmp_path):
    source = make_checkpoint(tmp_path / "source", "llama", intermediate_size=172)
    plan, report = quantize(source, tmp_path / "out", format="gptq")
    kept = {row.name for row in report.layers if row.kept}
    assert kept == {f"model.layers.{i}.mlp.{m}_proj" for i in range(2) for m in ("gate", "up", "down")}
    model = load(tmp_path / "out")
    for name, module in lora_modules(model).items():
        assert hasattr(module.base_layer, "qweight") is (name not in kept)
    assert_errors_are_the_reported_ones(plan, report, model, rel=1e-3)
    assert relative(logits(model), logits(dense_twin(source, model))) < 1e-4


def test_gpt2_s_projections_stay_dense_in_gptq_because_transformers_resets_them(tmp_path):
    source = make_checkpoint(tmp_path / "source", "gpt2")
    plan, _ = quantize(source, tmp_path / "out", format="gptq")
    kept = {layer.target.name.rsplit(".", 1)[-1] for layer in plan.layers if layer.kept}
    assert kept == {"c_proj"}
    plan, _ = quantize(source, tmp_path / "dense", format="dense")
    assert not any(layer.kept for layer in plan.layers)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(
    ("exclude", "excluded"),
    [
        ("model.layers.1.mlp.down_proj", ["model.layers.1.mlp.down_proj"]),  # a name of which another layer has one
        ("down_proj", ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]),
    ],
)
def test_excluded_layers_are_left_out_of_base_and_adapter(llama, tmp_path, exclude, excluded, fmt):
    plan, _ = quantize(llama, tmp_path / "out", format=fmt, exclude=exclude)
    model = load(tmp_path / "out")
    original = load_base(llama)
    assert len(lora_modules(model)) == 14 - len(excluded)
    for name in excluded:
        assert name not in lora_modules(model)
        assert torch.equal(model.get_base_model().get_submodule(name).weight, original.get_submodule(name).weight)
    assert_weights_are_q(plan, model, rtol=GPTQ_ROUNDING)
    assert relative(logits(model), logits(dense_twin(llama, model))) < 1e-4


@pytest.mark.parametrize("fmt", FORMATS)
def test_eleven_layers_are_told_apart_by_name(tmp_path, fmt):
    """`layers.1.` and `layers.10.`: nothing may match by a part of a number."""
    source = make_checkpoint(tmp_path / "source", "llama", num_hidden_layers=11)
    exclude = r"model\.layers\.1\..*"
    plan, _ = quantize(source, tmp_path / "out", format=fmt, exclude=exclude, target_modules="up_proj,down_proj")
    model = load(tmp_path / "out")
    assert set(lora_modules(model)) == {layer.target.name for layer in plan.quantized}
    assert len(plan.quantized) == 20
    assert_weights_are_q(plan, model, rtol=GPTQ_ROUNDING)


@pytest.mark.parametrize("method", ["qlora", "loftq", "qpissa"])
def test_published_methods_load_from_a_dense_base(llama, tmp_path, method):
    plan, report = quantize(llama, tmp_path / "out", method=method, format="dense", bits=2)
    assert_errors_are_the_reported_ones(plan, report, load(tmp_path / "out"), rel=1e-4)
