import pytest
import torch

from qinit.calibration.walk import Walk
from qinit.errors import CheckpointError
from qinit.stream import stored
from qinit.stream.blocks import Blocks
from qinit.stream.calls import NotStreamable
from tests.helpers import calibrated_plan, edit_config, edit_tensors, padded, quantize, random_samples
from tests.models import ENTANGLED, FAMILIES, OTHERS, make_checkpoint, make_float32
from tests.stock import load_base
from tests.traces import BLOCKS, assert_close, stock_states

CPU = torch.device("cpu")
STREAMABLE = (*FAMILIES, *OTHERS, "llava", "mixtral")


def on_meta(model):
    return all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(("family", "dtype"), [("llama", "bfloat16"), *((name, "float32") for name in STREAMABLE)])
def test_block_by_block_the_hidden_states_are_those_of_the_whole_model(family, dtype, mask, tmp_path):
    if dtype == "bfloat16":
        plan = calibrated_plan(make_checkpoint(tmp_path / family, family, dtype))
    else:
        plan = calibrated_plan(make_float32(tmp_path / family, family))
    samples = padded(random_samples(5), [12, 3, 7, 12, 9]) if mask else random_samples(5)
    expected = stock_states(plan, samples)
    blocks = Blocks.of(plan, CPU)
    row = blocks.rows[0]
    assert len(row) == 2
    assert row.prefix(1) == BLOCKS.get(family, "model.layers") + ".1."
    with torch.no_grad(), blocks.surroundings():
        start = row.start(samples.tokens, None if samples.mask is None else samples.mask.long())
        hidden = start.hidden
        assert_close(hidden, expected[0], 1e-5)
    with torch.no_grad():
        for index, call in enumerate(start.calls):
            hidden = call(row.load(index), hidden)
            row.unload(index)
            found, wanted = hidden, expected[index + 1]
            if mask:
                found, wanted = found[samples.mask], wanted[samples.mask]
            assert_close(found, wanted, 1e-4)
    assert on_meta(blocks.model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", STREAMABLE)
def test_large_embeddings_and_heads_stay_as_they_are_stored_and_change_nothing(family, tied, tmp_path, monkeypatch):
    plan = calibrated_plan(make_checkpoint(tmp_path / family, family, "bfloat16", tie_word_embeddings=tied))
    samples, found = random_samples(3), []
    for large in (1, 10**9):
        monkeypatch.setattr(stored, "LARGE", large)
        blocks = Blocks.of(plan, CPU)
        row = blocks.rows[0]
        with torch.no_grad(), blocks.surroundings(head=True) as held:
            start = row.start(samples.tokens, None)
            try:
                logits = blocks.after(samples.tokens, None, [start.hidden]).logits
            except NotStreamable:  # an encoder-decoder, which needs its decoder's states too
                logits = None
            found.append((start.hidden, logits, {each.dtype for each in held.values()}))
        row.unload(0)  # T5's is run for what it gives the others
        assert on_meta(blocks.model)
    (hidden, logits, dtypes), (wanted, expected, others) = found
    assert others == {torch.float32}
    assert dtypes <= {torch.float32, torch.bfloat16}
    assert torch.equal(hidden, wanted)
    assert (logits is None) == (expected is None)
    if logits is not None:
        assert_close(logits, expected, 1e-5)
    if family in ("llama", "mixtral", "opt", "gpt2"):
        assert torch.bfloat16 in dtypes


def test_blocks_that_give_a_list_are_run_on_from_too(tmp_path):
    import transformers

    config = transformers.OpenAIGPTConfig(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    torch.manual_seed(0)
    model = transformers.OpenAIGPTLMHeadModel(config).eval()
    model.save_pretrained(tmp_path)
    tokens = random_samples(2).tokens
    blocks = Blocks.of(calibrated_plan(tmp_path), CPU)
    with torch.no_grad(), blocks.surroundings(head=True):
        (row,) = blocks.rows
        start = row.start(tokens, None)
        hidden = start.hidden
        for index, call in enumerate(start.calls):
            hidden = call(row.load(index), hidden)
        assert_close(blocks.after(tokens, None, [hidden]).logits, model(tokens).logits, 1e-5)


class TestMemory:
    def test_only_what_lies_before_the_blocks_is_loaded_for_the_first_states(self, tmp_path):
        blocks = Blocks.of(calibrated_plan(make_float32(tmp_path / "m", "llama")), CPU)
        assert on_meta(blocks.model)
        with blocks.surroundings():
            loaded = {name for name, parameter in blocks.model.named_parameters() if not parameter.is_meta}
            assert loaded == {"model.embed_tokens.weight", "model.norm.weight"}  # no head: it is large and never run
        assert on_meta(blocks.model)

    def test_a_tied_head_is_the_embedding_and_is_loaded(self, tmp_path):
        blocks = Blocks.of(calibrated_plan(make_float32(tmp_path / "m", "llama", tie_word_embeddings=True)), CPU)
        samples = random_samples(2)
        with torch.no_grad(), blocks.surroundings():
            start = blocks.rows[0].start(samples.tokens, None)
        assert start.hidden.any()
        assert on_meta(blocks.model)

    def test_what_another_model_holds_too_is_held_once(self, tmp_path):
        one, other = (Blocks.of(calibrated_plan(make_float32(tmp_path / name, "llama")), CPU) for name in "ab")
        edit_tensors(tmp_path / "b/model.safetensors", lambda tensors: tensors["lm_head.weight"].mul_(2))
        with one.surroundings(head=True) as held, other.surroundings(head=True, others=held) as again:
            shared = {name for name in held if held[name] is again[name]}
            assert shared == {"model.embed_tokens.weight", "model.norm.weight"}
            assert torch.equal(other.model.lm_head.weight, 2 * one.model.lm_head.weight)
        assert on_meta(one.model)
        assert on_meta(other.model)

    def test_it_is_given_back_after_an_error_too(self, tmp_path):
        blocks = Blocks.of(calibrated_plan(make_float32(tmp_path / "m", "llama")), CPU)
        with pytest.raises(RuntimeError), blocks.surroundings():
            raise RuntimeError
        assert on_meta(blocks.model)

    def test_the_blocks_are_in_their_places_again_after_a_failed_pass(self, tmp_path):
        blocks = Blocks.of(calibrated_plan(make_float32(tmp_path / "m", "llama")), CPU)
        real = list(blocks.rows[0].blocks)
        with torch.no_grad(), blocks.surroundings(), pytest.raises(NotStreamable, match="without its blocks"):
            blocks.rows[0].start(torch.full((1, 4), 10**6), None)  # no such token
        assert all(one is other for one, other in zip(blocks.rows[0].blocks, real, strict=True))


def test_trained_buffers_come_from_the_checkpoint(tmp_path):
    source = make_float32(tmp_path / "m", "gemma4")
    edit_tensors(source / "model.safetensors", lambda tensors: tensors["model.layers.1.layer_scalar"].fill_(0.25))
    block = Blocks.of(calibrated_plan(source), CPU).rows[0].load(1)
    assert block.layer_scalar.item() == 0.25


def test_a_head_that_is_stored_as_another_matrix_is_not_tied_to_the_embedding(tmp_path):
    source = make_float32(tmp_path / "m", "llama")
    edit_config(source, tie_word_embeddings=True)
    blocks = Blocks.of(calibrated_plan(source), CPU)
    with blocks.surroundings(head=True):
        assert torch.equal(blocks.model.lm_head.weight, load_base(source).lm_head.weight)
        assert not torch.equal(blocks.model.lm_head.weight, blocks.model.model.embed_tokens.weight)
    file = source / "model.safetensors"
    edit_tensors(file, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = Blocks.of(calibrated_plan(source), CPU).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_of_what_sees_only_the_parameter_that_tells_the_model_s_place_is_loaded(tmp_path):
    source = make_float32(tmp_path / "m", "llava")
    blocks = Blocks.of(calibrated_plan(source), CPU)
    with blocks.surroundings(head=True) as held:
        beside = [name for name in held if not name.startswith(("model.language_model.", "lm_head."))]
        assert beside == [next(name for name, _ in blocks.model.named_parameters())]
        assert blocks.model.device == CPU
    blocks = Blocks.of(calibrated_plan(source, target_modules=".*"), CPU)  # asked for, they are there to be solved
    assert [row.path for row in blocks.rows] == ["model.language_model.layers"]
    with blocks.surroundings():
        assert not blocks.model.get_parameter("model.vision_tower.encoder.layers.1.mlp.fc1.weight").is_meta


class TestNotStreamable:
    def test_layers_in_no_row_at_all(self, tmp_path):
        plan = calibrated_plan(make_float32(tmp_path / "bert", "bert"), target_modules="transform.dense")
        with pytest.raises(NotStreamable, match="no blocks"):
            Blocks.of(plan, CPU)

    def test_a_tensor_that_the_checkpoint_lacks(self, tmp_path):
        source = make_float32(tmp_path / "m", "llama")
        edit_tensors(source / "model.safetensors", lambda tensors: tensors.pop("model.layers.1.input_layernorm.weight"))
        with pytest.raises(NotStreamable, match=r"no tensor model\.layers\.1\.input_layernorm\.weight"):
            Blocks.of(calibrated_plan(source), CPU)
        options = {"calibration": "random", "calibration_samples": 4, "calibration_length": 16, "format": "dense"}
        report = quantize(source, tmp_path / "out", group_size=32, **options)
        assert any("whole model in memory: the checkpoint has no tensor" in note for note in report.notes)

    def test_blocks_that_share_keys_and_values(self, tmp_path):
        source = make_float32(tmp_path / "m", "gemma4", **ENTANGLED)
        with pytest.raises(NotStreamable, match="keys and values of others"):
            Blocks.of(calibrated_plan(source), CPU)

    def test_a_missing_embedding(self, tmp_path):
        source = make_float32(tmp_path / "m", "llama")
        edit_tensors(source / "model.safetensors", lambda tensors: tensors.pop("model.embed_tokens.weight"))
        with pytest.raises(NotStreamable, match="does not run without its blocks"):
            next(iter(Walk(calibrated_plan(source), random_samples(), CPU, "sequential")))

    def test_damaged_tensors_are_an_error_of_the_checkpoint(self, tmp_path):
        source = make_float32(tmp_path / "m", "llama")
        edit_tensors(
            source / "model.safetensors",
            lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].fill_(float("nan")),
        )
        with pytest.raises(CheckpointError, match="up_proj"):
            Blocks.of(calibrated_plan(source), CPU).rows[0].load(0)

    def test_a_run_on_layers_outside_of_the_blocks_solves_them_too(self, tmp_path):
        source = make_float32(tmp_path / "bert", "bert")
        options = {"calibration": "random", "calibration_samples": 4, "calibration_length": 16, "format": "dense"}
        report = quantize(source, tmp_path / "out", group_size=32, **options)
        outside = next(row for row in report.layers if row.name == "cls.predictions.transform.dense")
        assert outside.tokens is None
        assert outside.output_error is None
        assert outside.error < outside.error_start
        assert (
            "cls.predictions.transform.dense: lies outside of the model's blocks, so solved without data"
            in report.notes
        )
        assert all(row.tokens == 64 for row in report.layers if row is not outside)
