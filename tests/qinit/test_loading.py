import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qinit
from qinit.errors import CheckpointError, RecipeError
from qinit.formats import FORMATS
from qinit.formats.gptq.reading import width_of
from qinit.plan.plan import LayerPlan, Plan
from qinit.planner.make import make_plan
from qinit.recipe import make_recipe
from qinit.runner.run import run
from qinit.source.demo import demo_directory
from tests.models import make_checkpoint
from tests.stock import delta, dense_twin, dense_weight, load_adapter, load_base, logits, lora_modules, solved

TOKENS = torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(1))
WIDTHS = (2, 3, 4, 8, 2, 2, 3)  # one of each kind in every block, and another one in the next


def mixed_plan(source: Path, form: str, widths=WIDTHS, **options) -> Plan:
    """A plan whose quantized layers take these widths in turn."""
    options = {"rank": 4, "iter": 1, "group_size": 32, "calibration": "none", "device": "cpu", **options}
    plan = make_plan(make_recipe(model=str(source), format=form, **options), source, "m")
    given = dict(zip([layer.target.name for layer in plan.quantized], itertools.cycle(widths), strict=False))

    def widen(layer: LayerPlan, bits: int) -> LayerPlan:
        return replace(layer, bits=bits, specs=tuple(FORMATS[form].specs(layer.target, bits, layer.group_size)))

    layers = (widen(each, given[each.target.name]) if each.kept is None else each for each in plan.layers)
    return replace(plan, layers=tuple(layers))


def write(plan: Plan, directory: Path) -> Path:
    list(run(plan, directory))
    return directory


def gptq_only() -> None:
    pytest.importorskip("gptqmodel", reason="pip install 'qinit[gptq]'")
    pytest.importorskip("optimum", reason="pip install 'qinit[gptq]'")


FAMILIES = {
    "llama": {},
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},  # Conv1D; c_proj is kept as it is
    "phi3": {},  # fused projections, which GPTQModel.load takes apart and then does not find
}


@pytest.fixture(scope="module", params=FAMILIES)
def source(request, tmp_path_factory):
    family = request.param
    return make_checkpoint(tmp_path_factory.mktemp(family) / "source", family, "float32", **FAMILIES[family])


@pytest.fixture(scope="module")
def mixed(source, tmp_path_factory):
    gptq_only()
    return write(mixed_plan(source, "gptq"), tmp_path_factory.mktemp("mixed") / "out")


@pytest.fixture(scope="module")
def dense(llama, tmp_path_factory):
    return write(mixed_plan(llama, "dense"), tmp_path_factory.mktemp("dense") / "out")


@pytest.fixture
def copied(dense, tmp_path):
    """A run's directory to damage."""
    return Path(shutil.copytree(dense, tmp_path / "out"))


class TestMixedWidths:
    def test_every_layer_has_its_width_its_codes_and_its_adapter(self, source, mixed):
        model = qinit.load(mixed, dtype=torch.float32)
        plan = mixed_plan(source, "gptq")
        solution, modules = solved(plan), lora_modules(model)
        assert {layer.bits for layer in plan.quantized} == {2, 3, 4, 8}
        assert type(model.get_base_model()).__name__ == plan.architecture.class_name
        for layer in plan.quantized:
            module = modules[layer.target.name]
            _, weight, low_rank = solution[layer.target.name]
            assert module.base_layer.bits == layer.bits
            # float16 is the kernel's type: s (q - z) is rounded once.
            torch.testing.assert_close(dense_weight(module.base_layer), weight.half().float(), rtol=2.0**-11, atol=1e-8)
            torch.testing.assert_close(delta(module), low_rank, rtol=1e-4, atol=1e-6)

    def test_it_computes_what_dense_weights_compute(self, source, mixed):
        model = qinit.load(mixed, dtype=torch.float32)
        expected = logits(dense_twin(source, model))
        torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))

    def test_a_step_of_training_reaches_the_adapter_alone(self, source, mixed):
        model = qinit.load(mixed, trainable=True, dtype=torch.float32).train()
        reference = load_adapter(dense_twin(source, model, with_adapter=False), mixed).train()
        gradients = []
        for each in (model, reference):
            each(input_ids=TOKENS, labels=TOKENS).loss.backward()
            gradients.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
        found, expected = gradients
        assert found.keys() == expected.keys() == {n for n, _ in model.named_parameters() if "lora_" in n}
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))

    def test_a_trained_adapter_is_saved_and_loaded_again(self, mixed, tmp_path):
        model = qinit.load(mixed, trainable=True, dtype=torch.float32).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(4):
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        model.save_pretrained(tmp_path)
        from peft import PeftModel

        again = PeftModel.from_pretrained(qinit.load(mixed, adapter=False, dtype=torch.float32), tmp_path)
        assert torch.equal(logits(again), logits(model))

    def test_the_base_alone_has_no_adapter(self, mixed):
        base = qinit.load(mixed, adapter=False)
        assert not hasattr(base, "peft_config")
        assert not any("lora_" in name for name, _ in base.named_parameters())

    def test_the_loaded_base_is_gptq_to_others_and_keeps_its_map(self, mixed, tmp_path):
        base = qinit.load(mixed, adapter=False)
        assert base.quantization_method == "gptq"
        base.save_pretrained(tmp_path / "saved")
        written, saved = (json.loads((place / "config.json").read_text()) for place in (mixed, tmp_path / "saved"))
        for key in ("quant_method", "bits", "dynamic", "checkpoint_format"):
            assert saved["quantization_config"][key] == written["quantization_config"][key]
        shutil.copy(mixed / "qinit.json", tmp_path / "saved")
        assert torch.equal(logits(qinit.load(tmp_path / "saved", adapter=False)), logits(base))

    def test_stock_transformers_refuses_it_and_stays_as_it_was(self, mixed):
        qinit.load(mixed)
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            load_base(mixed)


def test_gptqmodel_itself_loads_mixed_widths_where_there_is_a_tokenizer(llama, tmp_path):
    gptq_only()
    from gptqmodel import BACKEND, GPTQModel

    plan = mixed_plan(llama, "gptq")
    directory = write(plan, tmp_path / "out")
    for file in demo_directory().glob("tokenizer*"):
        shutil.copy(file, directory)
    model = GPTQModel.load(str(directory), backend=BACKEND.GPTQ_TORCH, device="cpu").model
    solution = solved(plan)
    for layer in plan.quantized:
        module = model.get_submodule(layer.target.name)
        assert module.bits == layer.bits
        expected = solution[layer.target.name][1].bfloat16().float()  # its choice of type on a CPU
        torch.testing.assert_close(dense_weight(module), expected, rtol=2.0**-7, atol=1e-8)


@pytest.mark.parametrize("model_class", ["LlamaForSequenceClassification", "LlamaModel"])
def test_mixed_widths_of_other_classes_load(tmp_path, model_class):
    gptq_only()
    source = make_checkpoint(tmp_path / "m", model_class=model_class, num_labels=2)
    directory = write(mixed_plan(source, "gptq"), tmp_path / "out")
    base = qinit.load(directory, adapter=False)
    assert type(base).__name__ == model_class
    assert {module.bits for module in base.modules() if hasattr(module, "qweight") and hasattr(module, "bits")} == {
        *WIDTHS
    }


def test_kept_layers_stay_dense_beside_mixed_widths(tmp_path):
    gptq_only()
    source = make_checkpoint(tmp_path / "m", intermediate_size=80)
    directory = write(mixed_plan(source, "gptq"), tmp_path / "out")
    modules = lora_modules(qinit.load(directory))
    packed = {name: module.base_layer.bits for name, module in modules.items() if hasattr(module.base_layer, "qweight")}
    assert packed == {layer.target.name: layer.bits for layer in mixed_plan(source, "gptq").quantized}
    assert {name.rsplit(".", 1)[-1] for name in modules.keys() - packed} == {"gate_proj", "up_proj", "down_proj"}


def test_one_width_loads_as_stock_loads_it(llama, tmp_path):
    gptq_only()
    directory = write(mixed_plan(llama, "gptq", widths=(3,)), tmp_path / "out")
    model = qinit.load(directory, dtype=torch.float32)
    assert torch.equal(logits(model), logits(load_adapter(load_base(directory), directory)))


def test_dense_loads_with_its_adapter_whatever_the_widths(llama, dense):
    model = qinit.load(dense)
    solution = solved(mixed_plan(llama, "dense"))
    for name, module in lora_modules(model).items():
        assert torch.equal(dense_weight(module.base_layer), solution[name][1])
    assert model.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in model.parameters())
    trainable = [name for name, p in qinit.load(str(dense), trainable=True).named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)


def test_the_device_is_where_everything_goes(dense):
    assert {p.device.type for p in qinit.load(dense, device="cpu").parameters()} == {"cpu"}
    with pytest.raises(RecipeError, match="no 'cuda:99' here"):
        qinit.load(dense, device="cuda:99")


@pytest.mark.parametrize(
    ("dynamic", "expected"),
    [
        ({}, 2),
        ({r"+:^a\.b$": {"bits": 4}}, 4),
        ({r"+:a": {"bits": 4}}, 4),  # from the start, not the whole name
        ({r"+:b": {"bits": 4}}, 2),
        ({r"a": {"bits": 8}, r"+:^a\.b$": {"bits": 4}}, 8),  # the first that matches; no sign is +
        ({r"+:^a\.b$": {"group_size": 32}}, 2),
    ],
)
def test_the_width_is_the_one_that_gptqmodel_reads(dynamic, expected):
    assert width_of("a.b", {"bits": 2, "dynamic": dynamic}) == expected
    gptq_only()
    from gptqmodel.quantization.config import dynamic_get

    assert dynamic_get(dynamic, "a.b", "bits", 2) == expected


class TestErrors:
    def test_no_such_directory(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"nothing: no such directory"):
            qinit.load(tmp_path / "nothing")

    def test_a_directory_that_is_not_qinit_s(self, llama):
        with pytest.raises(CheckpointError, match=r"qinit.json: not found; qinit.load reads directories that qinit"):
            qinit.load(llama)

    @pytest.mark.parametrize("report", [{}, {"source": 1}, {"source": {"class": None}}])
    def test_a_qinit_json_of_something_else(self, copied, report):
        (copied / "qinit.json").write_text(json.dumps(report))
        with pytest.raises(CheckpointError, match="names no model class"):
            qinit.load(copied)

    def test_a_class_that_transformers_lacks(self, copied):
        (copied / "qinit.json").write_text('{"source": {"class": "NoSuchModel"}}')
        with pytest.raises(CheckpointError, match=r"transformers .* has no NoSuchModel"):
            qinit.load(copied)

    @pytest.mark.parametrize("changes", [{"peft_type": "IA3"}, {"megatron_config": {"a": 1}, "megatron_core": "own"}])
    def test_an_adapter_that_qinit_did_not_write(self, copied, changes):
        file = copied / "eqft_init/adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        with pytest.raises(CheckpointError, match=r"adapter_config.json: not an adapter that qinit wrote"):
            qinit.load(copied)

    @pytest.mark.parametrize("value", [5, [], {"dynamic": [1]}, {"dynamic": {"a": {"bits": 3}}}])
    def test_a_quantization_that_qinit_did_not_write(self, copied, value):
        file = copied / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": value}))
        with pytest.raises(CheckpointError, match="its quantization_config is not what qinit writes"):
            qinit.load(copied)

    def test_an_adapter_beside_the_base_leads_nowhere(self, copied, llama):
        (copied / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(llama)}))
        with pytest.raises(CheckpointError, match="transformers would load the model that it names instead"):
            qinit.load(copied)

    @pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
    def test_an_adapter_that_is_not_there(self, copied, name):
        (copied / "eqft_init" / name).unlink()
        with pytest.raises(CheckpointError, match=rf"{name}: not found; load the base alone with adapter=False"):
            qinit.load(copied)
        assert qinit.load(copied, adapter=False) is not None

    @pytest.mark.parametrize("missing", [{"gptqmodel"}, {"optimum"}, {"gptqmodel", "optimum"}])
    def test_packages_that_are_not_installed(self, copied, monkeypatch, missing):
        config = json.loads((copied / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq", "bits": 2}
        (copied / "config.json").write_text(json.dumps(config))
        monkeypatch.setattr(
            "qinit.formats.gptq.loading.find_spec", lambda package: None if package in missing else object()
        )
        with pytest.raises(CheckpointError) as caught:
            qinit.load(copied)
        assert f"needs {' and '.join(sorted(missing))}; " in str(caught.value)
        assert str(caught.value).endswith('pip install "gptqmodel>=7.6,<7.7" "optimum>=2.3"')

    def test_weights_that_are_missing_are_not_made_up(self, copied):
        import safetensors.torch

        file = copied / "model.safetensors"
        tensors = safetensors.torch.load_file(file)
        del tensors["model.layers.0.mlp.up_proj.weight"]
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"lacks 1 weights .* \(model.layers.0.mlp.up_proj.weight\)"):
            qinit.load(copied)

    def test_a_damaged_adapter(self, copied):
        (copied / "eqft_init/adapter_model.safetensors").write_bytes(b"x" * 100)
        with pytest.raises(CheckpointError, match=r"eqft_init: the adapter cannot be loaded"):
            qinit.load(copied)

    def test_damaged_weights(self, copied):
        (copied / "model.safetensors").write_bytes(b"x" * 100)
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            qinit.load(copied)
