import pytest
import torch

from qinit.errors import RecipeError
from qinit.exports import FinishedRun
from qinit.exports.write import export
from tests.helpers import quantize
from tests.models import add_tokenizer, make_checkpoint


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_base_and_adapter_are_read_back_by_the_format_s_own_package(family, tmp_path):
    gguf = pytest.importorskip("gguf")
    source = make_checkpoint(tmp_path / "source", family, "float32")
    quantize(source, tmp_path / "run", bits=3, group_size=32, use_rslora=True)
    run = FinishedRun.open(tmp_path / "run")
    export(run, "gguf", tmp_path / "out")
    base, adapter = (gguf.GGUFReader(tmp_path / "out" / name) for name in ("model.gguf", "adapter.gguf"))
    assert base.get_field("general.architecture").contents() == family
    tensors, factors = ({each.name: each for each in reader.tensors} for reader in (base, adapter))
    name = "model.layers.1.self_attn.k_proj"
    weight = run.weights.read(f"{name}.weight", torch.device("cpu"))
    change = run.adapter.change(name, torch.device("cpu"))
    rows = torch.arange(len(weight))
    if family == "llama":  # 2 heads; the halves of each take turns
        rows = rows.view(2, 2, -1).transpose(1, 2).flatten()
    stored = tensors["blk.1.attn_k.weight"]
    assert stored.tensor_type.name == "Q4_0"
    found = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type))
    torch.testing.assert_close(found, weight[rows], rtol=2**-11, atol=0)  # the kernel rounds to float16
    a, b = (torch.from_numpy(factors[f"blk.1.attn_k.weight.lora_{side}"].data.copy()) for side in "ab")
    scale = adapter.get_field("adapter.lora.alpha").contents() / len(a)
    torch.testing.assert_close(scale * b @ a, change[rows])


def test_what_llama_cpp_has_not_is_refused_before_anything_is_written(tmp_path):
    pytest.importorskip("gguf")
    for family, message in (("gpt2", "GPT2LMHeadModel is not written"), ("llama", "of type WordLevel")):
        quantize(add_tokenizer(make_checkpoint(tmp_path / family, family)), tmp_path / f"{family}-run", format="dense")
        with pytest.raises(RecipeError, match=message):
            export(FinishedRun.open(tmp_path / f"{family}-run"), "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
