import pytest

from qinit.errors import TargetError
from qinit.families.targets import choose, feed_forward_of
from qinit.source.checkpoint import Checkpoint
from tests.models import make_checkpoint


@pytest.mark.parametrize(
    ("family", "ends"),
    [("llama", "mlp.down_proj"), ("gpt2", "mlp.c_proj"), ("opt", "fc2"), ("bert", "output.dense"), ("t5", "wo")],
)
def test_feed_forward_parts_end_where_they_narrow(family, ends, tmp_path):
    chosen = choose(Checkpoint.open(make_checkpoint(tmp_path / family, family)), None, None)
    found = feed_forward_of(chosen)
    assert len(found) == (4 if family == "t5" else 2)
    assert all(name.endswith(ends) and "attention" not in name.lower() for name in found)


def test_targets_are_chosen_as_everywhere(llama):
    checkpoint = Checkpoint.open(llama)
    assert choose(checkpoint, "q_proj,v_proj", r".*layers\.0\..*").names == [
        f"model.layers.1.self_attn.{name}" for name in ("q_proj", "v_proj")
    ]
    with pytest.raises(TargetError, match="did you mean"):
        choose(checkpoint, "q_prj", None)
