"""The counts of two models whose configurations are written down here, on the meta device."""

import pytest
import torch
import transformers

from qinit.snndlft.model import adapt
from qinit.snndlft.size import sizes
from tests.qinit.snndlft import tiny

DEBERTA = transformers.DebertaV2Config(
    vocab_size=128100, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
    max_position_embeddings=512, type_vocab_size=0, relative_attention=True, position_buckets=256,
    pos_att_type=["p2c", "c2p"], share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False,
)  # fmt: skip
LLAMA = transformers.LlamaConfig(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "model_class", "all_layers", "half", "single"),
    [
        (DEBERTA, transformers.DebertaV2Model, 331_920, 165_960, 27_660),  # 0.33M, 0.16M, 0.027M, cut off
        (LLAMA, transformers.LlamaForCausalLM, 213_056, 106_528, 13_316),  # 0.213M, 0.107M, and 0.0133M
    ],
)
def test_at_a_mean_rank_of_2_the_counts_are_those_that_the_method_is_described_with(
    config, model_class, all_layers, half, single
):
    with torch.device("meta"):
        model = adapt(model_class(config), tiny.config(**tiny.PLAIN))
        found = sizes(model, 2)
    assert (found.all, found.half, found.single) == (all_layers, half, single)
    assert sizes(model, 8).all == 4 * all_layers
