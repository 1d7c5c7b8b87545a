"""Adapters for bases that others have made, and what stock loaders make of the two together."""

import json

import pytest
import torch

from qinit.adapters.reading import SavedAdapter
from qinit.errors import CheckpointError
from qinit.verification.verify import verify
from tests.broken_off import RANDOM, break_off, finish, result_in, undisturbed
from tests.helpers import edit_tensors, names, quantize, repair
from tests.mixed import gptq_only
from tests.models import make_float32
from tests.others import CONFIGS, packed_base
from tests.stock import logits, relative

CPU = torch.device("cpu")
TEXT = {"calibration": "random", "calibration_samples": 32, "calibration_length": 64}
ONE = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model whose layers count, in float32."""
    return make_float32(tmp_path_factory.mktemp("source") / "llama", initializer_range=0.1)


@pytest.fixture(scope="module")
def bases(source, tmp_path_factory):
    place = tmp_path_factory.mktemp("bases")
    return {form: packed_base(source, place / form, form) for form in (*CONFIGS, "dense")}


def weight_of(directory, name=ONE):
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")[f"{name}.weight"].float()


@pytest.mark.parametrize("form", [*CONFIGS, "dense"])
def test_the_plain_residual_of_every_form_is_fitted(form, source, bases, tmp_path):
    report = repair(source, bases[form], tmp_path / "out")
    assert names(tmp_path / "out") == [
        *("README.md", "SHA256SUMS", "adapter_config.json", "adapter_model.safetensors", "qinit.json")
    ]
    assert report.totals["base"] == {"name": str(bases[form]), "form": form.removesuffix("_v2")}
    assert report.totals["error"] < 0.95 * report.totals["error_start"]
    same_codes = bases["dense" if form in ("gptq", "gptq_v2", "awq") else form]
    if form not in ("bitsandbytes", "compressed-tensors"):  # the same Q [out, in], stored in other ways
        W, Q = weight_of(source), weight_of(same_codes)
        U, S, Vh = torch.linalg.svd(W - Q)
        found = SavedAdapter.open(tmp_path / "out").change(ONE, CPU)
        best = (U[:, :4] * S[:4]) @ Vh[:4]
        assert relative(W - Q - found, W - Q - best) < 0.2
        row = next(row for row in report.layers if row.name == ONE)
        assert row.error == pytest.approx(float((W - Q - found).norm() / W.norm()), rel=1e-4)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(bases[form])


def load(base, adapter=None, **options):
    import transformers
    from peft import PeftModel

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)
    return model if adapter is None else PeftModel.from_pretrained(model, adapter, is_trainable=True)


@pytest.mark.parametrize("form", ["dense", "gptq", "awq", "bitsandbytes"])
def test_loaded_by_stock_loaders_base_and_adapter_are_closer_than_the_base(form, source, bases, tmp_path):
    if form in ("gptq", "awq"):
        gptq_only()
    if form == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    report = repair(source, bases[form], tmp_path / "out", **TEXT, rank=16, check=True)
    alone, repaired = load(bases[form]), load(bases[form], tmp_path / "out")
    wanted, start, end = (logits(model) for model in (load(source), alone, repaired))
    assert relative(end, wanted) < 0.9 * relative(start, wanted)
    check = report.totals["check"]
    assert check["kl"] < check["base_alone"]["kl"]
    assert report.totals["output_error"] < report.totals["output_error_start"]


def test_later_layers_see_what_was_repaired(source, bases, tmp_path):
    """The drift is made good: the same text, without it, ends farther away."""
    sequential = repair(source, bases["gptq"], tmp_path / "a", **TEXT, check=True, rank=8)
    apart = repair(source, bases["gptq"], tmp_path / "b", **TEXT, check=True, rank=8, calibration_mode="parallel")
    assert sequential.totals["check"]["kl"] < apart.totals["check"]["kl"]
    assert not torch.equal(*(SavedAdapter.open(tmp_path / each).change(ONE, CPU) for each in "ab"))


@pytest.mark.parametrize("options", [{"calibration": "none"}, RANDOM], ids=["data-free", "calibrated"])
def test_one_that_is_broken_off_goes_on_and_has_the_same_bytes(options, source, bases, place):
    options = {**options, "base": str(bases["bitsandbytes"])}
    wanted = undisturbed(source, place, **options)
    break_off(source, place / "out", 5, **options)
    finish(source, place / "out", **options)
    assert result_in(place / "out") == wanted


def test_layers_that_are_not_chosen_keep_the_q_of_the_base_and_get_no_adapter(source, bases, tmp_path):
    chosen = {"target_modules": "q_proj,v_proj"}
    report = repair(source, bases["dense"], tmp_path / "out", **TEXT, **chosen, check=True, polish=2)
    assert set(SavedAdapter.open(tmp_path / "out").parts) == {row.name for row in report.layers if row.rank}
    assert {row.name.rpartition(".")[2] for row in report.layers if row.rank} == {"q_proj", "v_proj"}
    assert len(report.layers) == 14
    row = next(row for row in report.layers if row.name == ONE)
    assert row.error == row.error_start
    assert report.totals["check"]["kl"] < report.totals["check"]["base_alone"]["kl"]
    assert not [event for event in verify(tmp_path / "out", source) if getattr(event, "grave", False)]


def test_a_run_of_qinit_is_a_base_too(source, tmp_path):
    made = quantize(source, tmp_path / "run", group_size=32, bits=3)
    report = repair(source, tmp_path / "run", tmp_path / "out", rank=8)
    assert report.totals["error_start"] == pytest.approx(made.totals["error_start"], rel=1e-4)
    assert report.totals["nominal_bits"] == 3


@pytest.mark.parametrize("method", ["eora", "qera", "lqer", "cloq"])
def test_published_fits_are_those_of_the_given_residual(method, source, bases, tmp_path):
    report = repair(source, bases["dense"], tmp_path / "out", method=method, **TEXT)
    assert report.totals["output_error"] < report.totals["output_error_start"]


def test_a_layer_without_residual_starts_as_peft_has_it(source, tmp_path):
    base = packed_base(source, tmp_path / "base", "dense", keep=lambda name: name.startswith(ONE))
    report = repair(source, base, tmp_path / "out")
    assert next(row for row in report.layers if row.name == ONE).error == 0
    parts = SavedAdapter.open(tmp_path / "out").parts[ONE]
    assert bool(parts["A"].read().any())
    assert not bool(parts["B"].read().any())


def test_a_polish_trains_it_further(reader, tmp_path):
    base = packed_base(reader, tmp_path / "base", "gptq")
    options = {"calibration": "random", "calibration_samples": 8, "calibration_length": 32, "polish": 3}
    report = repair(reader, base, tmp_path / "out", **options)
    assert report.totals["calibration"]["polish"]["steps"] == 3


def refused(source, base, tmp_path, what):
    with pytest.raises(CheckpointError, match=what):
        repair(source, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_with_a_scaled_norm_alone_is_refused(source, tmp_path):
    base = packed_base(source, tmp_path / "base", "awq")
    norm = "model.layers.0.input_layernorm.weight"
    edit_tensors(base / "model.safetensors", lambda tensors: tensors[norm].mul_(1.5))
    refused(source, base, tmp_path, "q_proj: a scale for each of its inputs is .* beside it makes that good")


def test_a_base_with_the_weights_of_another_model_is_refused(source, tmp_path):
    base = packed_base(make_float32(tmp_path / "other", seed=1, initializer_range=0.1), tmp_path / "base", "gptq")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        edit_tensors(
            base / "model.safetensors", lambda tensors, name=name: tensors.update({name: tensor_of(source, name)})
        )
    refused(source, base, tmp_path, "the cosine of .* in the two is -?0.0")


def tensor_of(directory, name):
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")[name]


HEAD = ("_proj.weight", "lm_head.weight")


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_a_quantized_head_that_no_loader_reads_is_refused(form, source, tmp_path):
    base = packed_base(source, tmp_path / "base", form, kinds=HEAD)
    refused(source, base, tmp_path, "lm_head is quantized, and .* starts? .* at random")
    gptq_only()
    assert not torch.equal(*(load(base).lm_head.weight for _ in range(2)))  # so it does


@pytest.mark.parametrize(
    ("form", "config"),
    [
        ("bitsandbytes", {"llm_int8_skip_modules": ["none"]}),
        ("compressed-tensors", {"ignore": []}),
    ],
)
def test_a_quantized_head_is_read_and_stays_as_it_is(form, config, source, tmp_path):
    pytest.importorskip(form.replace("-", "_"))
    base = packed_base(source, tmp_path / "base", form, kinds=HEAD, **config)
    report = repair(source, base, tmp_path / "out", **TEXT, rank=16, check=True)
    assert any(note.startswith("lm_head is quantized in the base") for note in report.notes)
    assert not any("lm_head" in module for module in SavedAdapter.open(tmp_path / "out").parts)
    assert report.totals["check"]["kl"] < report.totals["check"]["base_alone"]["kl"]
    assert not [event for event in verify(tmp_path / "out", source) if getattr(event, "grave", False)]
    edit_tensors(base / "model.safetensors", lambda tensors: tensors.update(shuffled(tensors)))
    refused(source, base, tmp_path / "again", "the cosine of lm_head in the two is -?0.0")


def shuffled(tensors):
    """The packed head with its rows in another order."""
    packed = next(name for name in ("lm_head.weight_packed", "lm_head.weight") if name in tensors)
    return {packed: tensors[packed].flip(0)}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return make_float32(tmp_path_factory.mktemp("experts") / "mixtral", "mixtral", initializer_range=0.1)


def test_experts_that_the_base_has_not_quantized_are_left_alone(experts, tmp_path):
    base = packed_base(experts, tmp_path / "base", "bitsandbytes")
    report = repair(experts, base, tmp_path / "out", **TEXT, check=True)
    assert report.totals["check"]["kl"] < report.totals["check"]["base_alone"]["kl"]

    def rename(tensors):
        for name in [name for name in tensors if "experts" in name]:
            tensors[name.replace("experts", "others")] = tensors.pop(name)

    edit_tensors(base / "model.safetensors", rename)
    refused(experts, base, tmp_path / "more", "has no '.*experts.*': experts that are stored in another way")


@pytest.mark.parametrize("form", CONFIGS)
def test_quantized_experts_are_refused_with_the_reason(form, experts, tmp_path):
    kinds = ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")
    base = packed_base(experts, tmp_path / "base", form, kinds=kinds)
    refused(experts, base, tmp_path, r"experts.0.w1.weight' is quantized, and experts are not read from .*: transf")
    if form == "gptq":  # the reason is true
        gptq_only()
        name = "model.layers.0.mlp.experts.gate_up_proj"
        assert not torch.equal(*(load(base).get_parameter(name) for _ in range(2)))
