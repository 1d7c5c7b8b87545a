import re
import shutil
from pathlib import Path

import pytest

from qinit.errors import CheckpointError, RecipeError
from qinit.servers import SERVERS
from qinit.verification.serving import check_serving
from tests.helpers import edit_json, quantize
from tests.models import make_checkpoint


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def said(directory, server, adapter=None):
    return [(each.grave, str(each)) for each in check_serving(directory, server, adapter)]


def settings(run, **changes):
    edit_json(run / "eqft_init/adapter_config.json", lambda config: config.update(changes))


def packed(run, **config):
    edit_json(run / "config.json", lambda value: value.update(quantization_config=config))


def test_a_dense_run_is_loaded_by_what_reads_safetensors_and_peft(run):
    assert said(run, "transformers") == said(run, "vllm") == []
    ((grave, adapter),) = said(run, "mlx")
    assert grave
    assert "reads an adapter as mlx-lm saves it, found one as PEFT saves it; `qinit export DIR --to mlx`" in adapter
    base, _ = said(run, "llama.cpp")
    assert "loads no unpacked bases (gguf); `qinit export DIR --to gguf`" in base[1]
    shutil.rmtree(run / "eqft_init")
    assert said(run, "mlx") == []


@pytest.mark.parametrize(
    ("changes", "words", "grave"),
    [
        ({"r": 20}, "a rank of 20, and vllm 0.32.0 takes 16 by default; start it with --max-lora-rank 32", True),
        ({"rank_pattern": {"q_proj": 600}}, "a rank of 600, .* at most 512: `qinit merge", True),
        (
            {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 8}},
            "r is 4 and rank_pattern goes up to 8",
            False,
        ),
        ({"alpha_pattern": {"q_proj": 8}}, "the scales of the layers are not one: .* `qinit merge", False),
        ({"use_dora": True}, "use_dora, which vllm 0.32.0 does not know; `qinit merge", True),
        ({"modules_to_save": ["lm_head", "score"]}, r"modules_to_save \['lm_head'\], which vllm", True),
        ({"bias": "all"}, "bias 'all': vllm 0.32.0 loads no biases", True),
        ({"lora_bias": True}, "lora_bias, which vllm 0.32.0 does not know", True),
    ],
)
def test_what_a_server_does_not_take_of_an_adapter_is_said_with_what_to_do(run, changes, words, grave):
    settings(run, **changes)
    found = said(run, "vllm")
    assert any(re.search(words, text) and is_grave == grave for is_grave, text in found)
    assert said(run, "transformers") == []
    shutil.move(run / "eqft_init", run.parent / "trained")
    assert said(run, "vllm") == []
    assert said(run, "vllm", run.parent / "trained")


def test_one_scale_with_other_ranks_is_fine_and_so_is_rslora(run):
    settings(run, r=8, lora_alpha=8, rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 4})
    assert said(run, "vllm") == []
    settings(run, use_rslora=True, r=16, lora_alpha=8, rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 4})
    assert said(run, "vllm") == []
    assert any("use_rslora, which llama.cpp" in text for _, text in said(run, "llama.cpp"))


@pytest.mark.parametrize(
    ("server", "config", "words"),
    [
        (
            "vllm",
            {"quant_method": "gptq", "bits": 2, "group_size": 64, "sym": True},
            "loads gptq with bits 4, 8, found [2]",
        ),
        ("vllm", {"quant_method": "gptq", "bits": 4, "group_size": 64}, "without zero points alone (sym: true)"),
        ("vllm", {"quant_method": "bitsandbytes", "load_in_4bit": True}, "loads no bitsandbytes bases"),
        ("mlx", {"quant_method": "gptq", "bits": 4, "group_size": 64}, "loads no gptq bases"),
        (
            "transformers",
            {"quant_method": "auto-round", "bits": 2, "group_size": 64, "sym": True},
            "loads the base without its adapter: PEFT has no LoRA for",
        ),
    ],
)
def test_what_a_server_does_not_load_of_a_base_is_said_with_what_to_do(run, server, config, words):
    packed(run, **config)
    grave, text = said(run, server)[0]
    assert grave
    assert words in text
    assert "`qinit export DIR --to" in text


def test_packed_mixed_widths_and_layers_that_a_server_computes_as_one(tmp_path):
    source = make_checkpoint(tmp_path / "source")
    options = {"target_bits": 3.2, "allocation": "random", "format": "gptq", "seed": 1, "tie": "none"}
    quantize(source, tmp_path / "run", **options)
    texts = "\n".join(text for _, text in said(tmp_path / "run", "vllm"))
    assert "as one layer, which needs one width" in texts
    assert "make the run with --tie fused" in texts
    texts = "\n".join(text for _, text in said(tmp_path / "run", "transformers"))
    assert "loads gptq of one width alone; `qinit export DIR --to dense`" in texts
    quantize(source, tmp_path / "tied", **{**options, "tie": "fused"})
    assert "as one layer" not in "\n".join(text for _, text in said(tmp_path / "tied", "vllm"))
    (tmp_path / "run/qinit.json").unlink()
    assert (False, "config.json: mixed widths, and no report names the layers: fused ones were not looked at") in said(
        tmp_path / "run", "vllm"
    )


def test_bad_input_and_that_the_page_has_every_server(run, tmp_path):
    with pytest.raises(RecipeError, match=r"--for: no 'vlm' \(did you mean 'vllm'\?\)"):
        said(run, "vlm")
    with pytest.raises(CheckpointError, match="no such directory"):
        said(tmp_path / "gone", "vllm")
    page = (Path(__file__).resolve().parents[3] / "docs/serving.md").read_text()
    for server in SERVERS.values():
        assert server.version.removeprefix("mlx-lm ") in page
        assert all(form in page for form in server.bases)
