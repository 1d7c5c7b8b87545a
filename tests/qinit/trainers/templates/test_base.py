"""What is written for adapter configurations is read by the trainers' languages, and by their own parsers."""

import ast
import json
import runpy
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qinit.errors import RecipeError
from qinit.recipe_files import template_names
from qinit.trainers.templates import WRITERS, Template
from qinit.trainers.training import Training
from qinit.trainers.write import config_for
from tests.helpers import gauss
from tests.models import make_reader, words
from tests.qinit.trainers.templates.option_names import option_names

HUB = Training.on("trl-lib/Capybara")
OTHERS = {"adalora_llama3.2_3b", "boft_llama3.2_3b", "oft_llama3.2_3b", "ia3_llama3.2_3b"}
PISSA = "pissa_llama3.2_3b_rank128"
NOT_TAKEN = {"trl": {*OTHERS, PISSA}, "llama-factory": OTHERS, "axolotl": OTHERS, "transformers": set()}


@pytest.mark.parametrize("trainer", WRITERS)
@pytest.mark.parametrize("name", template_names())
def test_a_template_is_written_or_refused_with_what_takes_it(name, trainer):
    writer, template = WRITERS[trainer], Template.open(Path(name))
    problem = writer.cannot_write(template, HUB)
    assert (problem is not None) == (name in NOT_TAKEN[trainer])
    if problem is not None:
        assert "--trainer peft" in problem
        return
    text = writer.write(template, HUB)
    for wanted in (template.base, HUB.name, f"{name}-{trainer}", "q_proj" if "ia3" not in name else "k_proj"):
        assert wanted in text
    if writer.suffix == ".py":
        ast.parse(text)
    elif writer.suffix == ".yaml":
        values = yaml.safe_load(text)
        assert (values["lora_r"] if trainer == "axolotl" else values["lora_rank"]) == template.settings["r"]
        assert values["learning_rate"] == 1e-4
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name", ["lora_llama2_7b_rank4", "dora_llama3.2_3b_rank128", "qlora_llama3.2_3b_rank128"])
def test_trl_s_own_parser_takes_the_flags(name):
    pytest.importorskip("trl", reason="pip install trl")
    from trl.scripts.sft import make_parser

    template = Template.open(Path(name))
    text = WRITERS["trl"].write(template, HUB).replace('"$bf16"', "False")  # what the line above says without a GPU
    flags = shlex.split(text[text.index("trl sft") :].replace("\\\n", ""))[2:]
    script, training, model, _ = make_parser().parse_args_and_config(flags, fail_with_unknown_args=True)
    assert (script.dataset_name, model.model_name_or_path) == (HUB.name, template.base)
    assert (training.seed, training.num_train_epochs, training.learning_rate) == (42, 1, 1e-4)
    assert (training.lr_scheduler_type, training.get_warmup_steps(1000)) == ("cosine", 30)
    assert (training.gradient_checkpointing, training.gradient_checkpointing_kwargs) == (True, {"use_reentrant": False})
    settings = template.settings
    assert (model.use_peft, model.lora_r, model.lora_alpha, model.lora_dropout) == (
        *(True, settings["r"], settings["lora_alpha"], settings["lora_dropout"]),
    )
    assert model.lora_target_modules == settings["target_modules"]
    assert (model.use_dora, model.load_in_4bit) == ("dora" in name, "qlora" in name)


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("trainer", ["llama-factory", "axolotl"])
def test_the_keys_are_options_of_the_trainer(trainer, bf16):
    known, written = option_names(), set()
    for name in sorted(set(template_names()) - NOT_TAKEN[trainer]):
        for data in (HUB, replace(Training.on("train.jsonl"), bf16=bf16)):
            values = yaml.safe_load(WRITERS[trainer].write(Template.open(Path(name)), data))
            written |= values.keys()
            assert {key for each in values.get("datasets", ()) for key in each} <= known["axolotl datasets"]
        assert values["bf16"] == ({"llama-factory": True, "axolotl": "auto"}[trainer] if bf16 else False)
    assert len(written) > 20
    assert written <= known[trainer]


@pytest.mark.parametrize(
    "settings", [{"peft_type": "LORA", "r": 4}, {"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "total_step": 9}]
)
def test_the_script_for_peft_trains(settings, tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="pip install 'qinit[datasets]'")
    base = make_reader(tmp_path / "base")
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({**settings, "base_model_name_or_path": str(base), "target_modules": ["q_proj"]}))
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"text": words(*range(first, first + 9))}) + "\n" for first in range(5, 9)))
    monkeypatch.chdir(tmp_path)
    written = config_for(file, "peft", str(data))
    (tmp_path / written.file).write_text(written.text.replace("gradient_accumulation_steps=16", "use_cpu=True"))
    runpy.run_path(str(tmp_path / written.file), run_name="__main__")
    saved = json.loads((tmp_path / "mine-transformers/adapter_config.json").read_text())
    assert saved["peft_type"] == settings["peft_type"]
    assert (tmp_path / "mine-transformers/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["ia3", "lora"])
def test_an_adapter_that_peft_has_started_is_gone_on_with(kind, tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="pip install 'qinit[datasets]'")
    base, start = make_reader(tmp_path / "base"), tmp_path / "start"
    config = IA3Config(task_type="CAUSAL_LM") if kind == "ia3" else LoraConfig(task_type="CAUSAL_LM", r=2)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += gauss(*parameter.shape, scale=0.5)
    model.save_pretrained(start)
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"text": words(*range(5, 14))}) + "\n")
    monkeypatch.chdir(tmp_path)
    written = config_for(start, "peft", str(data))
    assert written.file == "start-transformers.py"
    text = written.text.replace("learning_rate=1e-4", "learning_rate=0.0").replace("bfloat16", "float32")
    (tmp_path / written.file).write_text(text.replace("gradient_accumulation_steps=16", "use_cpu=True"))
    runpy.run_path(str(tmp_path / written.file), run_name="__main__")
    before, after = (load_file(d / "adapter_model.safetensors") for d in (start, tmp_path / "start-transformers"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for trainer in sorted(WRITERS.keys() - {"transformers"}):
        with pytest.raises(RecipeError, match="does not go on from start; --trainer peft does"):
            config_for(start, trainer, "a/b")


@pytest.mark.parametrize(
    ("values", "trainer", "dataset", "what"),
    [
        ({}, "trl", "a/b", "names no base to train on"),
        ({"base_model_name_or_path": "a/b"}, "trl", "a/b", "target_modules: expected names"),
        ({"base_model_name_or_path": "a/b", "target_modules": ["x"], "r": "4"}, "trl", "a/b", "r: expected a number"),
        ({"base_model_name_or_path": "a/b", "target_modules": ["x"]}, "trl", "train.jsonl", "--trainer peft takes one"),
        ({"base_model_name_or_path": "a/b"}, "unsloth", "a/b", "takes runs alone; templates are for transformers, trl"),
        (
            {"base_model_name_or_path": "a/b", "peft_type": "POLY"},
            "peft",
            "a/b",
            "is POLY; written are LORA and adalora",
        ),
    ],
)
def test_bad_input_is_one_line(values, trainer, dataset, what, tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps({"peft_type": "LORA", **values}))
    with pytest.raises(RecipeError, match=what) as error:
        config_for(tmp_path / "mine.json", trainer, dataset)
    assert "\n" not in str(error.value)
