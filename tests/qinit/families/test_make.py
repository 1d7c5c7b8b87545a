"""Adapters of every family, loaded by the lines that are printed, with stock PEFT, and trained a step."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from qinit.errors import OutputError, QinitError, RecipeError
from qinit.families import FAMILIES
from qinit.families.make import Wanted, make_adapter
from tests.helpers import contents, quantize
from tests.models import make_bert, make_checkpoint
from tests.peft_adapters import make_adapter as make_lora

GPTQ = pytest.mark.skipif(
    any(find_spec(package) is None for package in ("gptqmodel", "optimum")), reason="pip install gptqmodel optimum"
)
BNB = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="pip install bitsandbytes")
# What is tried on each form of base, and what is refused there; every family on a plain one.
CASES = [
    *(pytest.param("plain", method, True, id=f"plain-{method}") for method in FAMILIES),
    *(
        pytest.param("gptq", method, method != "ia3", marks=GPTQ, id=f"gptq-{method}")
        for method in ("adalora", "oft", "vera", "prefix-tuning", "ia3")
    ),
    *(
        pytest.param("bnb", method, method not in ("hra", "xlora"), marks=BNB, id=f"bnb-{method}")
        for method in ("adalora", "ia3", "adaption-prompt", "hra", "xlora")
    ),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A base of each form, made when it is asked for, by its name."""
    place = tmp_path_factory.mktemp("bases")
    make_checkpoint(place / "plain")

    def get(form):
        if not (place / form).exists() and form == "gptq":
            quantize(place / "plain", place / form)
        elif not (place / form).exists():
            import transformers

            nf4 = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
            load = transformers.AutoModelForCausalLM.from_pretrained
            load(place / "plain", quantization_config=nf4, dtype=torch.bfloat16).save_pretrained(place / form)
        return place / form

    return get


def wanted(base, method, tmp_path, **options):
    if method == "xlora":
        experts = {str(alpha): str(tmp_path / f"lora-{alpha}") for alpha in (8, 16)}
        options["settings"] = {"peft_type": "XLORA", "adapters": experts}
        if base.name == "plain":
            for alpha, place in experts.items():
                make_lora(base, Path(place), target_modules=["q_proj", "down_proj"], lora_alpha=int(alpha))
    return Wanted(base, str(base), method, **options)


def loaded_by(snippet):
    """What the printed lines make."""
    names = {}
    exec("\n".join(snippet), names)
    return names["model"]


def loss_of(model, method):
    tokens = torch.arange(3, 35).reshape(2, 16)
    return model(input_ids=tokens, labels=tokens, **FAMILIES[method].batch(2)).loss


@pytest.mark.parametrize(("form", "method", "taken"), CASES)
def test_an_adapter_is_loaded_by_stock_peft_and_trained_a_step_or_refused_with_the_reason(
    bases, form, method, taken, tmp_path
):
    base = bases(form)
    if not taken:
        with pytest.raises(RecipeError, match=rf"--method {method}: peft \S+ does not train it on a base quantized as"):
            make_adapter(wanted(base, method, tmp_path), tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    made = make_adapter(wanted(base, method, tmp_path), tmp_path / "out")
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    model = loaded_by(made.snippet).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(each.numel() for each in trained) == made.parameters > 0
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model, method).backward()
    copies = [each.detach().clone() for each in trained]
    torch.optim.Adam(trained, lr=0.1).step()  # moves what has a gradient that is not zero, however small
    assert any(not torch.equal(one, other) for one, other in zip(copies, trained, strict=True))


def test_the_same_seed_gives_the_same_bytes_and_peft_s_own_values(bases, tmp_path):
    import peft
    import transformers
    from safetensors.torch import load_file

    base = bases("plain")
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make_adapter(wanted(base, "lokr", tmp_path, seed=seed, rank=4), tmp_path / name)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    weights = "adapter_model.safetensors"
    assert a[weights] == b[weights] != c[weights]
    assert a["adapter_config.json"] == b["adapter_config.json"]
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    names = json.loads(a["adapter_config.json"])["target_modules"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = peft.get_peft_model(model, peft.LoKrConfig(r=4, target_modules=names, task_type="CAUSAL_LM"))
    theirs, ours = peft.get_peft_model_state_dict(model), load_file(tmp_path / "a" / weights)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_prompts_that_start_from_words_have_the_base_s_embeddings(bases, tmp_path):
    from safetensors.torch import load_file

    base = bases("plain")
    settings = {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "SAMPLE_VOCAB"}
    make_adapter(wanted(base, "prompt-tuning", tmp_path, settings=settings), tmp_path / "out")
    (prompts,) = load_file(tmp_path / "out/adapter_model.safetensors").values()
    table = load_file(base / "model.safetensors")["model.embed_tokens.weight"].float()
    assert len(prompts) == 20
    assert all((table == prompt).all(1).any() for prompt in prompts)


def test_adalora_starts_with_orthogonal_p_and_q_and_changes_nothing(bases, tmp_path):
    from safetensors.torch import load_file

    make_adapter(wanted(bases("plain"), "adalora", tmp_path), tmp_path / "out")
    for name, value in load_file(tmp_path / "out/adapter_model.safetensors").items():
        if "lora_E" in name:
            assert not value.any()
        elif value.dim() == 2:
            short = value.float() if value.shape[0] < value.shape[1] else value.float().T
            assert torch.allclose(short @ short.T, torch.eye(12), atol=0.02), name  # bfloat16, as the base is


@pytest.mark.parametrize(
    ("family", "inner"),
    [("llama", ["down_proj"]), ("gpt2", ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"])],
)
def test_ia3_scales_the_inputs_of_what_ends_a_feed_forward_part(family, inner, tmp_path):
    base = make_checkpoint(tmp_path / family, family)
    make_adapter(wanted(base, "ia3", tmp_path), tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["feedforward_modules"] == inner
    assert set(inner) <= set(config["target_modules"])


@pytest.mark.parametrize(
    ("method", "options", "what"),
    [
        ("ia3", {"rank": 4}, "--rank: ia3 has none"),
        ("lokr", {"rank": 65}, "rank: 65 is beyond model.layers.0"),
        ("vera", {"target_modules": "q_prj"}, "did you mean 'q_proj'"),
        ("prompt-tuning", {"target_modules": "q_proj"}, "adapts no linear layers"),
        ("oft", {"settings": {"peft_type": "OFT", "oft_block_sizes": 8}}, "did you mean 'oft_block_size'"),
        ("oft", {"settings": {"peft_type": "BOFT"}}, "the adapter configuration is one of boft"),
        ("boft", {"settings": {"peft_type": "BOFT", "boft_block_size": 7}}, "PEFT refuses it on"),
        ("adalora", {"rank": 6}, "target_r 8 is above the initial rank 6"),
        ("xlora", {}, "xlora mixes LoRA adapters that are there"),
        ("adalora", {"settings": {"peft_type": "ADALORA", "total_step": 5}}, "PEFT refuses it on"),
    ],
)
def test_bad_input_leaves_nothing(bases, method, options, what, tmp_path):
    base = bases("plain")
    with pytest.raises(QinitError, match=what) as error:
        make_adapter(Wanted(base, str(base), method, **options), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_prompts_are_for_models_of_peft_s_tasks(tmp_path):
    base = make_bert(tmp_path / "bert")
    with pytest.raises(RecipeError, match="and BertForMaskedLM is for none of them"):
        make_adapter(Wanted(base, str(base), "prefix-tuning"), tmp_path / "out")


@GPTQ
def test_a_base_of_several_widths_is_loaded_by_qinit(bases, tmp_path):
    base = tmp_path / "mixed"
    options = {"target_bits": 3.0, "bits_choices": "2,4", "allocation": "first", "format": "gptq"}
    quantize(bases("plain"), base, **options)
    made = make_adapter(Wanted(base, str(base), "oft"), tmp_path / "out")
    assert made.snippet[0].startswith("import qinit")
    assert loaded_by(made.snippet).base_model.model.model.layers[0].self_attn.q_proj.get_base_layer().bits == 4


def test_a_model_that_a_family_does_not_take_is_refused_with_peft_s_words(tmp_path):
    base = make_checkpoint(tmp_path / "qwen2", "qwen2")
    with pytest.raises(RecipeError, match=r"PEFT refuses it on .*ValueError: Unsupported model type"):
        make_adapter(Wanted(base, str(base), "adaption-prompt"), tmp_path / "out")


def test_only_an_adapter_is_replaced_and_only_where_that_was_asked_for(bases, tmp_path):
    base = bases("plain")
    out = tmp_path / "out"
    make_adapter(wanted(base, "oft", tmp_path), out)
    with pytest.raises(OutputError, match="exists; choose another place"):
        make_adapter(wanted(base, "ia3", tmp_path), out)
    (out / "notes.txt").write_text("x")
    with pytest.raises(OutputError, match=r"what qinit did not write and what would be lost: notes\.txt; move it"):
        make_adapter(wanted(base, "ia3", tmp_path), out, overwrite=True)
    (out / "notes.txt").unlink()
    make_adapter(wanted(base, "ia3", tmp_path), out, overwrite=True)
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "IA3"
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # by the umask
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(OutputError, match="holds something else than an adapter"):
        make_adapter(wanted(base, "ia3", tmp_path), base, overwrite=True)
