"""The command that a card gives."""

from types import SimpleNamespace

import pytest

from qinit.exports.vllm import RANKS, vllm_command
from qinit.servers import SERVERS


@pytest.mark.parametrize(("ranks", "most"), [((), 8), ((4, 16), 16), ((17,), 32), ((512, 8), 512)])
def test_the_least_rank_that_vllm_knows_and_that_takes_the_adapter(ranks, most):
    report = SimpleNamespace(layers=[SimpleNamespace(rank=rank) for rank in ranks])
    assert f" --max-lora-rank {most} " in vllm_command(report)
    assert set(RANKS) <= set(SERVERS["vllm"].adapter.rank_choices)
