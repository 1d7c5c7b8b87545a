import pytest

from qinit.errors import ReportError
from qinit.report.adapter_card import is_adapter, require_base
from tests.helpers import quantize, repair
from tests.others import packed_base


@pytest.mark.parametrize(
    ("form", "package", "opened"), [("awq", "gptqmodel", 0), ("compressed-tensors", "compressed_tensors", 1)]
)
def test_the_card_names_base_and_source_and_loads_both(form, package, opened, llama, tmp_path):
    base = packed_base(llama, tmp_path / "base", form)
    report = repair(llama, base, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"base_model: {base}" in card
    assert f"repairs `{base}` ({form}, " in card
    assert card.count("\nbase.hf_quantizer.compressor.decompress_model(base)\nmodel = ") == opened
    assert f'base = LlamaForCausalLM.from_pretrained("{base}", dtype="auto")' in card
    assert 'PeftModel.from_pretrained(base, ".", is_trainable=True)' in card
    assert f"pip install {package}" in card
    assert is_adapter(report)
    with pytest.raises(ReportError, match=r"holds an adapter alone, for the base .*; do so"):
        require_base(report, tmp_path / "out", "do so")


def test_a_run_has_its_own_base(llama, tmp_path):
    report = quantize(llama, tmp_path / "run")
    assert not is_adapter(report)
    require_base(report, tmp_path / "run", "")
