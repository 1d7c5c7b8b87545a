"""Bases whose scales were moved between layers, as AWQ does it, by hand."""

import shutil

import pytest
import torch

from qinit.errors import CheckpointError
from qinit.runner.moved import in_its_coordinates
from qinit.verification.verify import verify
from tests.helpers import edit_tensors, plan_of, repair
from tests.models import make_checkpoint, make_float32
from tests.others import packed_base
from tests.stock import logits, relative

HEADS = {"num_key_value_heads": 4}  # as many as heads: AutoAWQ scales the outputs of v there alone


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_float32(tmp_path_factory.mktemp("source") / "llama", initializer_range=0.1, **HEADS)


def scales_of(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, generator=generator) - 0.5).exp()


def awq_moves(tensors, *, behind_norms=("q", "k", "v", "gate", "up"), pairs=True):
    """AWQ's transformation of every block: AutoAWQ's scale_ln_fcs and scale_fc_fc."""
    for block in range(2):
        stem = f"model.layers.{block}."
        mlp, attn = stem + "mlp.", stem + "self_attn."
        for seed, (norm, where) in enumerate([("input_layernorm", attn), ("post_attention_layernorm", mlp)]):
            scale = scales_of(len(tensors[f"{stem}{norm}.weight"]), 10 * block + seed)
            tensors[f"{stem}{norm}.weight"] /= scale
            for name in behind_norms:
                if (key := f"{where}{name}_proj.weight") in tensors:
                    tensors[key] *= scale
        for seed, (first, second) in enumerate([(attn + "v", attn + "o"), (mlp + "up", mlp + "down")] if pairs else []):
            scale = scales_of(len(tensors[f"{first}_proj.weight"]), 100 + 10 * block + seed)
            tensors[f"{first}_proj.weight"] /= scale[:, None]
            shared = tensors[f"{second}_proj.weight"].shape[1] // len(scale)  # heads that read one of v
            tensors[f"{second}_proj.weight"] *= scale.view(-1, 16).repeat_interleave(shared, 0).flatten()
            if f"{first}_proj.bias" in tensors:
                tensors[f"{first}_proj.bias"] /= scale


def moved_base(source, place, form="awq", moves=awq_moves):
    """Move scales in a copy of a model, and pack that."""
    shutil.copytree(source, place / "scaled")
    edit_tensors(place / "scaled" / "model.safetensors", moves)
    return packed_base(place / "scaled", place / "base", form)


@pytest.mark.parametrize(("form", "calibration"), [("awq", "random"), ("compressed-tensors", "none")])
def test_the_residual_is_that_of_the_scaled_weights(form, calibration, source, tmp_path):
    base, measured = moved_base(source, tmp_path, form), calibration != "none"
    options = {"calibration": calibration, "calibration_samples": 8, "calibration_length": 32, "rank": 8}
    report = repair(source, base, tmp_path / "out", check=measured, **options)
    other = packed_base(source, tmp_path / "plain", form)
    plain = repair(source, other, tmp_path / "other", check=measured, **options)
    for key in ("error_start", "error"):
        assert report.totals[key] == pytest.approx(plain.totals[key], rel=0.2)
    if measured:
        checks = (each.totals["check"] for each in (report, plain))
        left, wanted = (each["kl"] / each["base_alone"]["kl"] for each in checks)
        assert left < min(1.15 * wanted, 0.9)
    assert any("14 of 14 layers are repaired towards" in note for note in report.notes)
    assert not any("towards" in note for note in plain.notes)
    assert not [event for event in verify(tmp_path / "out", source) if getattr(event, "grave", False)]


@pytest.mark.parametrize("values", [4, 2])
def test_the_source_in_the_coordinates_of_the_base_is_the_same_model(values, tmp_path):
    """With a head of v for each of q, and with fewer, which several share."""
    import transformers

    from qinit.stream.whole import load_whole

    source = make_float32(tmp_path / "llama", initializer_range=0.1, num_key_value_heads=values)
    plan = in_its_coordinates(plan_of(source, base=str(moved_base(source, tmp_path))))
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    assert relative(logits(load_whole(plan)), logits(model)) < 1e-5
    norm, o = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(plan.checkpoint.tensors[norm].read(), plan.given.checkpoint.tensors[norm].read())
    unmoved = plan_of(source).checkpoint.tensors[o].read()
    heads = (plan.checkpoint.tensors[o].read() / unmoved).mean(0).view(values, -1, 16)
    assert (heads.amax(1) - heads.amin(1)).max() < 1e-5 < heads.std()  # one head of v is scaled in one way


def test_biases_of_outputs_that_were_scaled_are_the_bases(tmp_path):
    source = make_float32(tmp_path / "qwen2", "qwen2", initializer_range=0.1, **HEADS)
    base = moved_base(source, tmp_path)
    report = repair(source, base, tmp_path / "out")
    assert report.totals["error"] < 0.2
    bias = "model.layers.1.self_attn.v_proj.bias"
    edit_tensors(base / "model.safetensors", lambda tensors: tensors[bias].add_(1.0))
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.v_proj: its outputs are scaled, and its bias is no"):
        repair(source, base, tmp_path / "again")


def half_moved(tensors):
    awq_moves(tensors, behind_norms=("q", "k", "v", "gate"), pairs=False)


def o_alone(tensors):
    tensors["model.layers.1.self_attn.o_proj.weight"] *= scales_of(64, 0)


def norm_alone(tensors):
    tensors["model.layers.1.input_layernorm.weight"][3] *= -1


def final_norm(tensors):
    tensors["model.norm.weight"] *= 1.5


@pytest.mark.parametrize(
    ("moves", "what"),
    [
        (half_moved, r"layers.0.mlp.up_proj: a scale for each of its inputs is \d+ % of what it is away"),
        (o_alone, r"layers.1.self_attn.o_proj: a scale for each of its inputs .* no norm or layer beside it"),
        (norm_alone, r"layers.1.input_layernorm: it is another than the source's, and not by a scale for each channel"),
        (final_norm, r"its model.norm.weight is not the source's \(50.0 % away\)"),
    ],
)
def test_what_is_not_made_good_elsewhere_is_refused_by_name(moves, what, source, tmp_path):
    base = moved_base(source, tmp_path, moves=moves)
    with pytest.raises(CheckpointError, match=what):
        repair(source, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_without_moved_scales_is_left_as_it_is(tmp_path):
    source = make_checkpoint(tmp_path / "llama")
    plan = plan_of(source, base=str(packed_base(source, tmp_path / "base", "awq")))
    assert in_its_coordinates(plan) is plan
