import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import qinit
from qinit.errors import RecipeError
from qinit.evaluate.figures import logits_of, measure, perplexity
from qinit.evaluate.job import Block, choose_way, evaluate
from qinit.evaluate.subject import Subject
from qinit.evaluate.windows import cut_windows
from qinit.stream import carried
from tests.evaluated import CPU, TOKENS, figures, make_run, make_source, subject
from tests.helpers import edit_config, exhausted
from tests.models import make_float32
from tests.stock import load, load_base

FAMILIES = ("llama", "gpt2", "opt")
RUNS = {
    "dense": {"format": "dense", "lora_alpha": 12},
    "dense-mixed": {"format": "dense", "widths": (2, 3, 4, 8), "ranks": (4, 2, 6), "lora_alpha": 7},
    "gptq": {"format": "gptq", "lora_alpha": 12, "use_rslora": True},
    "gptq-mixed": {"format": "gptq", "widths": (2, 3, 4, 8, 2, 2, 3), "ranks": (4, 2), "use_rslora": True},
}


@pytest.fixture(scope="module", params=FAMILIES)
def source(request, tmp_path_factory):
    return make_source(tmp_path_factory.mktemp(request.param) / request.param, request.param)


@pytest.fixture(scope="module")
def bfloat16_llama(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("one") / "llama", "llama", "bfloat16")


@pytest.fixture(scope="module")
def dense(bfloat16_llama, tmp_path_factory):
    return make_run(bfloat16_llama, tmp_path_factory.mktemp("dense") / "run", format="dense")


@pytest.mark.parametrize(
    ("source", "kind"),
    [(family, kind) for family in FAMILIES for kind in RUNS if family == "llama" or kind.endswith("mixed")],
    indirect=["source"],
)
def test_block_by_block_the_figures_are_those_of_what_the_stock_loaders_load(source, kind, tmp_path):
    if kind.startswith("gptq"):
        pytest.importorskip("gptqmodel", reason="pip install 'qinit[gptq]'")
    directory = make_run(source, tmp_path / "run", **RUNS[kind])
    stock = qinit.load(directory, dtype=torch.float32) if kind == "gptq-mixed" else load(directory)
    windows = cut_windows(TOKENS, 25, 10)
    steps = measure(windows, 3, logits_of(stock.eval(), windows), logits_of(load_base(source).eval(), windows))
    with torch.no_grad():
        expected, _ = exhausted(steps)
    original = Subject("original", source)
    streamed = figures(subject(directory), original, windows, stream="always", batch_size=4)
    loaded = figures(subject(directory), original, windows, stream="never", batch_size=2)
    for found in (streamed, loaded):
        assert found.loss == pytest.approx(expected.loss, rel=2e-6)
        assert found.reference_loss == pytest.approx(expected.reference_loss, rel=2e-6)
        assert found.kl == pytest.approx(expected.kl, rel=1e-4)
        assert found.agreement == expected.agreement
    assert expected.kl > 0.1  # what is compared is not noise
    # ... and neither base, nor scale, nor adapter is beside the point.
    alone = figures(Subject("base", directory), windows=windows, stream="always")
    assert abs(alone.loss - expected.loss) > 5e-3
    assert alone.loss == pytest.approx(
        figures(Subject("base", directory), windows=windows, stream="never").loss, rel=2e-6
    )


def test_ranks_of_their_own_are_there_to_be_read(source, tmp_path):
    directory = make_run(source, tmp_path / "run", **RUNS["dense-mixed"])
    config = json.loads((directory / "eqft_init/adapter_config.json").read_text())
    assert config["rank_pattern"]
    assert config["alpha_pattern"]
    assert config["lora_alpha"] != config["r"]


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gpt_neox", "llava", "mixtral"])
def test_a_plain_checkpoint_of_another_family(family, tmp_path):
    source = Subject("m", make_float32(tmp_path / "m", family))
    streamed, loaded = (figures(source, stream=stream) for stream in ("always", "never"))
    assert streamed.loss == pytest.approx(loaded.loss, rel=2e-6)


def test_a_head_that_the_configuration_ties_and_the_checkpoint_does_not(tmp_path):
    source = Subject("m", make_source(tmp_path / "m"))
    edit_config(source.base, tie_word_embeddings=True)
    streamed, loaded = (figures(source, stream=stream) for stream in ("always", "never"))
    assert streamed.loss == pytest.approx(loaded.loss, rel=2e-6)


def test_bfloat16_weights_are_computed_with_in_float32(bfloat16_llama):
    expected = math.log(perplexity(load_base(bfloat16_llama), TOKENS, 25))
    assert figures(Subject("m", bfloat16_llama), stream="always").loss == pytest.approx(expected, rel=1e-5)


def test_one_block_is_in_memory_at_a_time(dense, bfloat16_llama):
    windows, model = cut_windows(TOKENS, 25), subject(dense)
    original = Subject("original", bfloat16_llama)
    way = choose_way(model, original, windows, CPU, stream="always")
    events = [event for event in evaluate(model, original, windows, way, CPU) if isinstance(event, Block)]
    assert [(event.model, event.done, event.blocks) for event in events] == [
        *((str(dense), done, 2) for done in (1, 2)),
        *(("original", done, 2) for done in (1, 2)),
    ]


def test_hidden_states_that_take_too_much_memory_go_to_disk_and_are_removed(
    dense, bfloat16_llama, tmp_path, monkeypatch
):
    expected = figures(subject(dense), Subject("original", bfloat16_llama), stream="always")
    monkeypatch.setattr(carried, "CARRIED_SHARE", 0.0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert figures(subject(dense), Subject("original", bfloat16_llama), stream="always") == expected
    assert not list(tmp_path.iterdir())


class TestNotStreamable:
    def refused(self, model, said):
        with pytest.raises(RecipeError, match=rf"cannot be run block by block \({said}.*use --stream never"):
            figures(model, stream="always")

    def copied(self, directory, tmp_path):
        return shutil.copytree(directory, tmp_path / "copy")

    def test_more_than_factors(self, dense, tmp_path):
        run = self.copied(dense, tmp_path)
        file = run / "eqft_init/adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "use_dora": True}))
        self.refused(subject(run), r".*eqft_init: more than what LORA adds to weights \(.*without its magnitude\)")

    def test_factors_of_something_else(self, dense, tmp_path):
        run = self.copied(dense, tmp_path)
        file = run / "eqft_init/adapter_model.safetensors"
        tensors = load_file(file)
        for part in "AB":
            tensors[f"base_model.model.lm_head.lora_{part}.weight"] = torch.zeros(4, 4)
        save_file(tensors, file)
        self.refused(subject(run), ".*has factors for lm_head, which is no linear layer inside")

    def test_other_packed_weights(self, dense, tmp_path):
        run = self.copied(dense, tmp_path)
        config = json.loads((run / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (run / "config.json").write_text(json.dumps(config))
        self.refused(subject(run), "its weights are packed as bitsandbytes")

    def test_a_checkpoint_without_its_head(self, bfloat16_llama, tmp_path):
        source = self.copied(bfloat16_llama, tmp_path)
        tensors = load_file(source / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        self.refused(Subject("m", source), "the checkpoint has no tensor lm_head.weight")
