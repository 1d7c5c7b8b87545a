import json

import pytest
import torch
from safetensors.torch import load_file

from qinit.errors import CheckpointError, OutputError
from qinit.merge.plan import plan_merge
from qinit.merge.run import merge
from tests.helpers import contents, edit_json, edit_tensors, quantize
from tests.models import make_float32
from tests.peft_adapters import load_base, make_adapter, put_on

IDS = torch.arange(3, 43).view(2, 20)
# Every kind that PEFT can merge: family, what LoraConfig is given.
KINDS = {
    "ranks and alphas by module": (
        "llama",
        {
            "target_modules": r".*\.(q|o|up)_proj",
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, r".*\.up_proj": 7},
            "alpha_pattern": {"o_proj": 3.0},
        },
    ),
    "rslora": ("llama", {"target_modules": ["v_proj", "down_proj"], "use_rslora": True}),
    "dora": ("llama", {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "use_dora": True}),
    "dora, transposed": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "use_dora": True, "fan_in_fan_out": True}),
    "trained whole": ("llama", {"target_modules": ["k_proj"], "modules_to_save": ["lm_head", "input_layernorm"]}),
    "trained whole, tied": (
        "llama",
        {"target_modules": ["k_proj"], "modules_to_save": ["embed_tokens"], "tie_word_embeddings": True},
    ),
    "head, tied": ("llama", {"target_modules": ["lm_head", "k_proj"], "tie_word_embeddings": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "k_proj"]}),
    "rows, tied": (
        "llama",
        {"target_modules": ["k_proj"], "trainable_token_indices": [3, 9, 200], "tie_word_embeddings": True},
    ),
    "biases": ("qwen2", {"target_modules": ["q_proj", "k_proj"], "bias": "all", "lora_bias": True}),
    "experts": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "one parameter of experts that says it is turned": (
        "gpt_oss",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"], "alpha_pattern": {"down_proj": 5.0}},
    ),
    "a matrix as a parameter": ("llama", {"target_modules": [], "target_parameters": ["up_proj.weight"], "r": 3}),
}


def merged(run, out, adapter=None, **options):
    *_, last = merge(plan_merge(run, adapter, **options), out, command="qinit merge")
    return last.report


def weights_in(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Return a function that gives a dense run in float32 of a family, each made once."""
    made = {}

    def base(family, **overrides):
        key = family, tuple(overrides.items())
        if key not in made:
            place = tmp_path_factory.mktemp(family)
            source = make_float32(place / "source", family, initializer_range=0.1, **overrides)
            quantize(source, place / "run", format="dense", group_size=32)
            made[key] = place / "run"
        return made[key]

    return base


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_peft_merges_and_what_the_unmerged_model_predicts(bases, tmp_path, kind):
    family, settings = KINDS[kind]
    settings = dict(settings)
    tied = {key: settings.pop(key) for key in ("tie_word_embeddings",) if key in settings}
    run = bases(family, **tied)
    adapter = make_adapter(run, tmp_path / "adapter", **settings)
    report = merged(run, tmp_path / "out", adapter)
    assert report.merged
    trained = put_on(run, adapter).eval()
    with torch.no_grad():
        expected = trained(input_ids=IDS).logits
        found = load_base(tmp_path / "out")(input_ids=IDS).logits
        plain = load_base(run)(input_ids=IDS).logits
    assert (expected - plain).norm() > 0.01 * plain.norm()  # else nothing would be shown
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    if tied and not kind.startswith("rows"):
        return  # PEFT's own merge changes the head with the embeddings, which is not what was trained
    theirs = trained.merge_and_unload().state_dict()
    for name, tensor in load_base(tmp_path / "out").state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)
