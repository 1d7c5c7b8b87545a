from pathlib import Path

import pytest

from qinit.plan.plan import Plan
from qinit.train.student import Start
from tests.qinit.train.starts import begin


@pytest.fixture(scope="module")
def start(strong_llama: Path) -> tuple[Plan, dict[str, Start]]:
    """The plan of a model, and the starts of its layers."""
    return begin(strong_llama)
