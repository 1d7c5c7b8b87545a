import torch
from torch import nn

from qinit.stock.feeds import Feed, feeds
from qinit.stock.inputs import possible_inputs


def test_what_norms_give_is_followed_to_the_layers_that_read_it(skeleton):
    built = skeleton("llama")
    model = built.build()
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "head" not in name}
    found = feeds(model, linear, list(possible_inputs(model, built.checkpoint.directory)))
    stem = "model.layers.0."
    attention = [f"{stem}self_attn.{name}_proj" for name in "qkv"], [f"{stem}self_attn.o_proj"]
    assert found[0] == Feed(f"{stem}input_layernorm", *attention)
    mlp = [f"{stem}mlp.gate_proj", f"{stem}mlp.up_proj"], [f"{stem}mlp.down_proj"]
    assert found[1] == Feed(f"{stem}post_attention_layernorm", *mlp)
    assert len(found) == 4  # not the last norm, which the head reads


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.device("meta"):
            self.norm, self.a = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, input_ids, use_cache):
        x = self.norm(torch.zeros(*input_ids.shape, 8, device="meta"))
        return self.a(x.view(-1, 8)).view_as(x) + x


def test_another_function_that_reads_it_is_named():
    model = Model()
    trials = [{"input_ids": torch.zeros(1, 4, dtype=torch.long)}]
    assert feeds(model, {"a": model.a}, trials) == [Feed("norm", ["a"], [], "add")]
    assert not model.norm._forward_hooks
    assert feeds(model, {"a": model.a}, [{"pixels": torch.zeros(1)}]) == []
