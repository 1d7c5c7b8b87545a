"""What is packed anew, as the loaders of each form compute with it."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from qinit.errors import RecipeError
from qinit.exports import EXPORTS, FinishedRun
from qinit.exports.symmetric import half
from qinit.exports.words import symmetric_words
from qinit.exports.write import export
from qinit.formats.gptq.packing import pack_rows, unpack_rows
from tests.helpers import edit_tensors, quantize
from tests.models import make_checkpoint

IDS = torch.arange(3, 43).view(2, 20)
KINDS = {"2": {"bits": 2}, "3": {"bits": 3}, "mixed": {"target_bits": 3.0, "allocation": "random"}}


def near_the_middle(directory, layers):
    """Give a run zero points of half - 1 and half alone; its codes are as good as any here."""

    def change(tensors):
        for name, bits in layers.items():
            shape = tensors[f"{name}.scales"].shape
            zeros = half(bits) - torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(bits)).byte()
            tensors[f"{name}.qzeros"] = pack_rows(zeros, bits)

    edit_tensors(directory / "model.safetensors", change)


@pytest.fixture(scope="module", params=KINDS.items(), ids=KINDS)
def run(request, tmp_path_factory):
    place = tmp_path_factory.mktemp(request.param[0])
    report = quantize(
        make_checkpoint(place / "source", "llama", "float32"), place / "run", format="gptq", **request.param[1]
    )
    near_the_middle(place / "run", {row.name: row.bits for row in report.layers if row.bits})
    return place / "run"


@pytest.fixture(scope="module")
def opened(run):
    return FinishedRun.open(run)


def layer_values(opened):
    return {m.name: opened.weights.read(f"{m.name}.weight", torch.device("cpu")) for m in opened.architecture.linear}


def logits(directory, load=None):
    from transformers import AutoModelForCausalLM

    model = (load or AutoModelForCausalLM.from_pretrained)(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def expected(run):
    pytest.importorskip("gptqmodel")
    import qinit

    model = qinit.load(run, adapter=False, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_compressed_tensors_as_its_own_package_reads_it(opened, run, tmp_path):
    module = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    export(opened, "compressed-tensors", tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    bits = {row.name: row.bits for row in opened.report.layers if row.bits}
    for name, value in layer_values(opened).items():
        codes = module.unpack_from_int32(tensors[f"{name}.weight_packed"], bits[name], torch.Size(value.shape))
        assert tensors[f"{name}.weight_shape"].tolist() == list(value.shape)
        scales = tensors[f"{name}.weight_scale"]
        assert bool((scales < 0).any())
        repeated = scales.float().repeat_interleave(value.shape[1] // scales.shape[1], dim=1)
        assert torch.equal((repeated * codes).half().float(), value)
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert said["ignore"] == ["lm_head"]
    assert len(said["config_groups"]) == len(set(bits.values()))


def test_compressed_tensors_loads_packed_and_trains(opened, expected, tmp_path):
    pytest.importorskip("compressed_tensors")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    export(opened, "compressed-tensors", tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert any(name.endswith("weight_packed") for name in base.state_dict())
    with torch.no_grad():
        # gptqmodel rounds weights to float16, compressed-tensors keeps the products
        torch.testing.assert_close(base(input_ids=IDS).logits, expected, rtol=1e-3, atol=1e-3)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    again.hf_quantizer.compressor.decompress_model(again)
    model = PeftModel.from_pretrained(again, tmp_path / "out", subfolder="eqft_init", is_trainable=True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)


def test_gptq_s_first_version_is_the_run_to_the_last_bit(opened, expected, tmp_path):
    import qinit

    export(opened, "gptq", tmp_path / "out")
    model = qinit.load(tmp_path / "out", adapter=False, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, expected)


def test_auto_round_is_the_same_without_g_idx(opened, tmp_path):
    export(opened, "gptq", tmp_path / "gptq")
    export(opened, "auto-round", tmp_path / "out")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "gptq"))
    assert ours.keys() == {name for name in theirs if not name.endswith("g_idx")}
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    bits = {row.name: row.bits for row in opened.report.layers if row.bits}
    assert said["block_name_to_quantize"] == "model.layers"
    assert {name: said["extra_config"].get(name, said)["bits"] for name in bits} == bits
    for name, width in bits.items():
        assert set(unpack_rows(ours[f"{name}.qzeros"], width).unique().tolist()) == {half(width) - 1}
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "PeftModel" not in card  # which refuses auto-round's layers
    assert 'from transformers import LlamaForCausalLM\nbase = LlamaForCausalLM.from_pretrained(".", dtype=' in card


def test_groups_that_end_within_words_are_flipped_too(opened):
    layer = EXPORTS["gptq"].layout(opened)[0]
    grid = opened.weights.grid(layer.module)
    found = symmetric_words(opened, layer)
    halves = replace(grid, group_size=16, zeros=grid.zeros.repeat_interleave(grid.group_size // 16, dim=1))
    if grid.bits * halves.group_size % 32 == 0:
        pytest.skip("groups of whole words")

    class Weights:
        def grid(self, module):
            return halves

    class Scales:
        name, file, numel = "", "", 0

        def read(self, device):
            return layer.parts["scales"].read(device).repeat_interleave(grid.group_size // 16, dim=0)

    parts = {**layer.parts, "scales": Scales()}
    again = symmetric_words(replace(opened, weights=Weights()), replace(layer, parts=parts))
    assert torch.equal(again.codes, found.codes)


def test_what_has_other_zero_points_is_refused(tmp_path):
    quantize(make_checkpoint(tmp_path / "source"), tmp_path / "run", bits=4)
    for to in ("compressed-tensors", "auto-round", "gptq"):
        with pytest.raises(RecipeError, match=rf"--to {to}: \d+ of \d+ groups .* 7 or 8 at 4 bits.*--symmetric"):
            export(FinishedRun.open(tmp_path / "run"), to, tmp_path / "out")
