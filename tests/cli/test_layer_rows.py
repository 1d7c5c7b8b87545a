"""The rows of a plan's table."""

from dataclasses import replace

from qinit_cli.layer_rows import rows_of

from tests.helpers import plan_of
from tests.models import make_checkpoint


def test_experts_that_are_alike_have_one_row(tmp_path):
    plan = plan_of(make_checkpoint(tmp_path / "m", "qwen3_moe", num_hidden_layers=1), format="dense")
    wider = [replace(layer, bits=3) if layer.target.name.endswith("up_proj[2]") else layer for layer in plan.layers]
    rows = {name.rsplit(".", 1)[-1]: len(layers) for name, layers in rows_of(replace(plan, layers=tuple(wider)))}
    assert rows == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 1),
        "gate_up_proj[0-1, 3]": 3,
        "gate_up_proj[2]": 1,
        "down_proj[0-3]": 4,
    }
