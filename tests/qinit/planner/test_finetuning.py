import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from qinit.loading import load
from qinit.planner.finetuning import LOGITS_COPIES, fine_tuning
from tests import stock
from tests.helpers import plan_of
from tests.models import make_checkpoint

TOKENS, WIDTH, VOCABULARY, BLOCKS = 96, 64, 256, 2
PACKED = pytest.mark.skipif(not (find_spec("gptqmodel") and find_spec("optimum")), reason="pip install 'qinit[gptq]'")


def kept_by_torch(directory, autocast):
    """Return the bytes that a pass forward keeps for the one back, beside parameters and the logits. The autocast of a
    CPU keeps what that of a GPU does."""
    model = load(directory, trainable=True).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and VOCABULARY not in tensor.shape:
            kept[storage.data_ptr()] = tensor
        return tensor

    tokens = torch.arange(3, 3 + TOKENS)[None]
    casting = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), casting:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    ("family", "form", "dtype"),
    [
        ("llama", "dense", "bfloat16"),
        ("llama", "dense", "float32"),
        pytest.param("llama", "gptq", "bfloat16", marks=PACKED),
        ("gemma2", "dense", "bfloat16"),  # no fused kernel for its attention
    ],
)
def test_the_activations_are_those_that_torch_keeps(tmp_path, family, form, dtype):
    source = make_checkpoint(tmp_path / "source", family, dtype)
    plan, _ = stock.quantize(source, tmp_path / "run", format=form, iter=1)
    for autocast in (False, True):
        said = fine_tuning(plan, TOKENS, 1, checkpointing=False, autocast=autocast)
        assert said.activations == pytest.approx(kept_by_torch(tmp_path / "run", autocast), rel=0.15)
    files = (tmp_path / "run").glob("*.safetensors")
    assert said.base == pytest.approx(sum(file.stat().st_size for file in files), rel=0.1)


@pytest.fixture
def plan(tiny_llama):
    return lambda **options: plan_of(tiny_llama, **options)


def test_checkpoints_keep_what_blocks_read_and_one_block(plan):
    with_it, without = (
        fine_tuning(plan(format="dense"), TOKENS, 2, checkpointing=each, autocast=False) for each in (True, False)
    )
    outside = 2 * TOKENS * WIDTH * 4
    assert with_it.activations == outside + BLOCKS * 2 * TOKENS * WIDTH * 2
    assert with_it.working - without.working == (without.activations - outside) / BLOCKS
    assert with_it.total < without.total


def test_the_adapter_its_gradients_and_two_moments_are_float32(plan):
    made = plan()
    said = fine_tuning(made, TOKENS, 1, checkpointing=True, autocast=False)
    factors = sum(layer.rank * sum(layer.target.tensor.shape) for layer in made.layers)
    assert said.adapter == said.optimizer == 2 * 4 * factors


def test_logits_grow_with_the_tokens_and_are_not_there_with_the_working_memory(plan):
    said = fine_tuning(plan(), TOKENS, 3, checkpointing=False, autocast=False)
    assert said.logits == LOGITS_COPIES * 4 * 3 * TOKENS * VOCABULARY
    fixed = said.base + said.adapter + said.optimizer + said.activations
    assert said.total == fixed + max(said.logits, said.working)


def test_under_autocast_what_adapters_read_is_in_16_bits(plan):
    half, single = (fine_tuning(plan(), TOKENS, 1, checkpointing=False, autocast=each) for each in (True, False))
    read = 6 * WIDTH + 2 * WIDTH  # the seventh reads twice as much
    ranks = 7 * 4
    assert single.activations - half.activations == BLOCKS * TOKENS * 2 * (read + ranks)


def test_packed_layers_are_kept_unpacked_but_not_with_checkpoints(plan):
    def activations(form, checkpointing):
        return fine_tuning(plan(format=form), TOKENS, 1, checkpointing=checkpointing, autocast=False).activations

    weights = sum(layer.weights for layer in plan().quantized)
    assert activations("gptq", False) - activations("dense", False) == 2 * weights
    assert activations("gptq", True) == activations("dense", True)


def test_experts_count_as_often_as_a_token_meets_them(tmp_path):
    made = [
        plan_of(make_checkpoint(tmp_path / str(n), "mixtral", num_experts_per_tok=n), format="gptq") for n in (1, 2)
    ]
    one, two = (fine_tuning(each, TOKENS, 1, checkpointing=False, autocast=True).activations for each in made)
    assert two > one


def test_what_was_measured_is_within_15_percent():
    kept = json.loads((Path(__file__).resolve().parents[3] / "model_zoo/results/finetune-memory.json").read_text())
    assert len(kept["rows"]) >= 10
    for row in kept["rows"]:
        assert row["said"] == pytest.approx(row["measured"], rel=0.15)
