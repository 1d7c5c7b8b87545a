import json
from dataclasses import replace

import pytest
import torch
import transformers

from qinit.errors import CheckpointError, TargetError
from qinit.planner.settled import require_packed, with_whole
from tests.helpers import edit_tensors, plan_of
from tests.models import GATED, SMALL, make_checkpoint
from tests.stock import load, quantize

LAYERS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
# name: configuration class, model class, values
KINDS = {
    "mamba": ("MambaConfig", "MambaForCausalLM", {**SMALL, "hidden_size": 64, "num_hidden_layers": 2}),
    "falcon": ("FalconConfig", "FalconForCausalLM", {**SMALL, **LAYERS}),
    "llama4": ("Llama4TextConfig", "Llama4ForCausalLM", {**GATED, "num_local_experts": 2, "head_dim": 16}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**GATED, **EXPERTS, "mlp_only_layers": [0]}),
    "clip": ("CLIPTextConfig", "CLIPTextModel", {**SMALL, **LAYERS, "max_position_embeddings": 32}),
    "siglip": ("SiglipVisionConfig", "SiglipVisionModel", {**LAYERS, "image_size": 16, "patch_size": 8}),
    "bert": ("BertConfig", "BertForTokenClassification", {**SMALL, **LAYERS, "num_labels": 5}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return what makes a tiny checkpoint of a kind, once."""

    def make(kind):
        directory = tmp_path_factory.getbasetemp() / f"settled-{kind}"
        if not directory.exists():
            config, model, values = KINDS[kind]
            torch.manual_seed(0)
            getattr(transformers, model)(getattr(transformers, config)(**values)).save_pretrained(directory)
        return directory

    return make


DIRECT = "the model reads the weight directly, so that an adapter would have no effect"
MOVED = "PEFT would put the adapter on the experts instead (peft issue 3711)"
NOTES = {
    "mamba": {
        f"2 modules named dt_proj are left alone, without an adapter: {DIRECT}",
        "2 modules named out_proj are left alone, without an adapter: peft: [PEFT:PeftType.LORA] Module 'out_proj' is "
        "incompatible with Mamba-based models (model_type='mamba')",
    },
    "llama4": {"2 linear layers that choose among experts, or weigh them, stay as they are"},
    "qwen3_moe": {f"3 modules named gate_proj, up_proj and down_proj are left alone, without an adapter: {MOVED}"},
    "bert": {"classifier is left alone, without an adapter: trained whole by PEFT, as a part of the head"},
    "siglip": {
        "format dense: transformers loads GPTQ only for models whose main input is input_ids, and that of "
        "SiglipVisionModel is pixel_values",
        f"head.attention.out_proj is left alone, without an adapter: {DIRECT}",
    },
}


@pytest.mark.parametrize("kind", NOTES)
def test_what_the_loaders_do_not_repair_is_left_out_and_said(kind, made):
    plan = plan_of(made(kind), group_size=32)
    assert NOTES[kind] <= set(plan.notes)
    assert plan.recipe.format == ("dense" if kind == "siglip" else "gptq")
    left, planned = ({each.target.name for each in group} for group in (plan.left, plan.layers))
    assert left or kind == "llama4"
    assert not left & planned
    assert {each.target.tensor.name for each in plan.left} <= {piece.name for piece in plan.copied}
    assert len(left | planned | plan.architecture.routers) == len(plan.architecture.linear)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (
            "falcon",
            {},
            "format gptq can hold none of the 8 .*class FalconLinear is not nn.Linear .*--format dense",
        ),
        ("clip", {}, "format gptq can hold none of the 12 .*sets this weight from its parent .*--format dense"),
        (
            "mamba",
            {"target_modules": "out_proj"},
            r"none of the 2 chosen layers can be repaired \(2 modules named",
        ),
    ],
)
def test_a_plan_of_which_nothing_is_left_is_refused_with_the_reason(kind, options, said, made):
    with pytest.raises(TargetError, match=said):
        plan_of(made(kind), group_size=32, **options)


def test_subclasses_and_what_parents_initialize_are_quantized_where_nothing_is_packed(made):
    assert len(plan_of(made("falcon"), format="dense").quantized) == 8
    assert len(plan_of(made("clip"), format="dense").quantized) == 12


def test_a_user_who_names_such_a_layer_gets_the_note_too(made):
    plan = plan_of(made("mamba"), format="dense", target_modules="in_proj,out_proj")
    assert {layer.target.name.rsplit(".", 1)[-1] for layer in plan.layers} == {"in_proj"}
    assert any("out_proj are left alone" in note for note in plan.notes)


@pytest.mark.parametrize("fmt", ["dense", "gptq"])
def test_a_head_is_as_it_was_and_the_stock_loader_trains_it(fmt, tmp_path):
    if fmt == "gptq":
        pytest.importorskip("gptqmodel")
        pytest.importorskip("optimum")
    options = {"model_class": "LlamaForSequenceClassification", "num_labels": 32}
    source = make_checkpoint(tmp_path / "m", **options)
    plan, report = quantize(source, tmp_path / "out", format=fmt)
    assert [each.name for each in plan.whole] == ["base_model.model.score.weight"]
    assert report.totals["whole_bytes"] == 32 * 64 * 2
    from peft import PeftModel

    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype="auto")
    model = PeftModel.from_pretrained(base, tmp_path / "out", subfolder="eqft_init", is_trainable=True)
    head = model.get_base_model().score
    original = transformers.AutoModelForSequenceClassification.from_pretrained(source).score.weight
    assert torch.equal(head.modules_to_save["default"].weight.float(), original.float())
    assert head.modules_to_save["default"].weight.requires_grad
    assert json.loads((tmp_path / "out/eqft_init/adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


def test_a_head_that_is_not_in_the_checkpoint_is_an_error(made, tmp_path):
    import shutil

    source = shutil.copytree(made("bert"), tmp_path / "m")
    edit_tensors(source / "model.safetensors", lambda tensors: tensors.pop("classifier.bias"))
    with pytest.raises(CheckpointError, match=r"has no 'classifier\.bias', a part of the head of BertForTokenClassif"):
        plan_of(source, format="dense")


def test_what_is_trained_whole_is_found_again_for_layers_that_are_settled(made):
    plan = plan_of(made("bert"), group_size=32)
    assert plan.whole
    assert with_whole(replace(plan, whole=())).whole == plan.whole


def test_other_modules_than_the_plan_has_must_not_be_packed(tiny_llama, monkeypatch):
    plan = plan_of(tiny_llama)
    require_packed(plan)
    monkeypatch.setattr("qinit.formats.gptq.format.packed", lambda modules, config: {"lm_head"})
    with pytest.raises(TargetError, match="format gptq: its loader would pack other modules than were chosen"):
        require_packed(plan)
    require_packed(plan_of(tiny_llama, format="dense"))


def test_a_module_that_is_read_directly_has_no_adapter_when_loaded(made, tmp_path):
    plan, report = quantize(made("mamba"), tmp_path / "out", format="dense")
    model = load(tmp_path / "out")
    adapted = {name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert adapted == {row.name for row in report.layers} == {layer.target.name for layer in plan.layers}
