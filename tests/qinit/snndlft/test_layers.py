import torch

from qinit.snndlft.layers import BLOCK, layers_of, state_bytes, train_only
from tests.qinit.snndlft import tiny


def test_a_layer_is_a_block_up_to_the_first_number():
    names = ["model.layers.3.self_attn.q_proj", "h.11.mlp.experts.2.up", "layers.0", "pooler.dense", "head2.out"]
    found = [match[0] if (match := BLOCK.match(name)) else None for name in names]
    assert found == ["model.layers.3", "h.11", "layers.0", None, None]


def test_layers_that_wait_have_no_gradient_and_no_state():
    model = tiny.adapted(tiny.config(**tiny.PLAIN))
    layers = layers_of(model.base_model.model, "default")
    assert [layer.name for layer in layers] == [f"model.layers.{number}" for number in range(3)]
    assert [list(layer.modules) for layer in layers[:1]] == [
        [f"model.layers.0.self_attn.{name}_proj" for name in ("q", "v")]
    ]
    assert layers[0].size == layers[0].size_at(4) == 4 * (64 + 1 + 64) + 4 * (64 + 1 + 32)
    optimizer = torch.optim.AdamW(parameter for layer in layers for parameter in layer.parameters)
    batch = {key: value[None] for key, value in tiny.examples()[0].items()}
    for chosen in ({layer.name for layer in layers}, {"model.layers.1"}, {"model.layers.1", "model.layers.2"}):
        train_only(layers, chosen, optimizer)
        model(**batch).loss.backward()
        optimizer.step()
        trains = [layer for layer in layers if layer.name in chosen]
        kept = sum(2 * 4 * parameter.numel() + 4 for layer in trains for parameter in layer.parameters)
        assert state_bytes(optimizer) == kept  # two moments in float32, and a count of steps
        for layer in layers:
            assert {parameter.grad is not None for parameter in layer.parameters} == {layer.name in chosen}
