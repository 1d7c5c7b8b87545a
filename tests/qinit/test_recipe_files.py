import json
import shutil
import warnings
from pathlib import Path

import pytest

from qinit.errors import RecipeError, TargetError
from qinit.families import FAMILIES, family_named
from qinit.recipe import make_recipe
from qinit.recipe_files import find_recipe, read_adapter_config, recipe_of, template_names
from tests.helpers import plan_of
from tests.models import make_checkpoint

LLAMA = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


def settings(name):
    return read_adapter_config(find_recipe(Path(name)))


@pytest.mark.parametrize("rank", [4, 8, 16])
def test_a_template_is_a_recipe_by_its_name(rank):
    recipe = make_recipe(Path(f"lora_llama2_7b_rank{rank}"))
    assert (recipe.rank, recipe.lora_alpha, recipe.lora_dropout) == (rank, 2 * rank, 0.1)
    assert (recipe.target_modules, recipe.method) == (LLAMA, "eqft")
    assert make_recipe(Path(f"lora_llama2_7b_rank{rank}"), rank=3).rank == 3


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("lora_llama3.2_3b_rank128", {"lora_dropout": 0.1}),
        ("dora_llama3.2_3b_rank128", {"lora_dropout": 0.1, "use_dora": True}),
        ("pissa_llama3.2_3b_rank128", {"lora_dropout": 0.0, "method": "pissa", "niter": 4}),
        ("qlora_llama3.2_3b_rank128", {"lora_dropout": 0.1, "method": "qlora", "bits": 4, "format": "dense"}),
    ],
)
def test_what_carries_over(name, more):
    same = {"rank": 128, "lora_alpha": 256, "target_modules": LLAMA}
    assert recipe_of(settings(name), name) == {**same, **more}


def test_nf4_is_a_recipe_of_qlora():
    recipe = make_recipe(Path("qlora_llama3.2_3b_rank128"))
    assert (recipe.method, recipe.row.grid, recipe.bits) == ("qlora", "nf", 4)


@pytest.mark.parametrize("name", template_names())
def test_peft_reads_every_template_and_the_families_are_in_the_table(name, tmp_path):
    import peft

    shutil.copy(find_recipe(Path(name)), tmp_path / "adapter_config.json")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # LoRA's has no place for how its base is quantized
        config = peft.PeftConfig.from_pretrained(str(tmp_path))
    values = settings(name)
    for key, value in values.items():
        if key not in ("peft_type", "quantization_config"):
            found = getattr(config, key)
            assert (sorted(found) == sorted(value)) if isinstance(found, set) else (found == value), key
    assert values["peft_type"] == "LORA" or type(config).__name__ == FAMILIES[family_named(values)].config


def test_what_peft_saves_itself_is_taken(tmp_path):
    import peft

    peft.LoraConfig(r=5, lora_alpha=7, target_modules=["q_proj"], use_rslora=True).save_pretrained(str(tmp_path))
    recipe = make_recipe(tmp_path / "adapter_config.json")
    assert (recipe.rank, recipe.lora_alpha, recipe.target_modules, recipe.use_rslora) == (5, 7.0, "q_proj", True)


def test_the_dropout_is_written_for_trainers(llama):
    plan = plan_of(llama, lora_dropout=0.1)
    assert plan.adapter.config(plan.recipe, plan.architecture, plan.ranks, "")["lora_dropout"] == 0.1


def test_a_template_for_another_architecture_is_refused(tmp_path):
    gpt2 = make_checkpoint(tmp_path / "gpt2", "gpt2")
    with pytest.raises(TargetError, match=r"no linear module is named 'q_proj'.*the model has c_attn"):
        plan_of(gpt2, target_modules=make_recipe(Path("lora_llama2_7b_rank4")).target_modules)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"peft_type": "IA3"}, "peft_type IA3 is no LoRA"),
        ({"peft_type": "LORA", "bias": "all"}, "bias: a recipe has no place for it"),
        ({"peft_type": "LORA", "modules_to_save": ["lm_head"]}, "modules_to_save: a recipe has no place"),
        ({"peft_type": "LORA", "init_lora_weights": "gaussian"}, "makes no start 'gaussian'"),
        ({"peft_type": "LORA", "target_modules": 3}, "expected names or a regular expression"),
        ({"peft_type": "LORA", "r": "many"}, "rank: "),
        ({"peft_type": "LORA", "quantization_config": {"load_in_8bit": True}}, "quantization_config: expected NF4"),
        ("{", "not valid JSON"),
    ],
)
def test_bad_input_is_one_line(values, what, tmp_path):
    file = tmp_path / "adapter_config.json"
    file.write_text(values if isinstance(values, str) else json.dumps(values))
    with pytest.raises(RecipeError, match=what) as error:
        make_recipe(file)
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)


def test_an_unknown_template_is_answered_with_the_closest():
    with pytest.raises(RecipeError, match=r"no adapter configuration .*did you mean 'lora_llama2_7b_rank8'"):
        make_recipe(Path("lora_llama2_7b_rank88"))
