import json
import shutil

import pytest
import torch

import qinit
from qinit.source.demo import demo_directory
from tests.mixed import WIDTHS, gptq_only, mixed_plan, write
from tests.models import make_checkpoint
from tests.stock import delta, dense_twin, dense_weight, load_adapter, load_base, logits, lora_modules, solved

TOKENS = torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(1))


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
