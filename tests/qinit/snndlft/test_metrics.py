import numpy as np
import pytest

from qinit.errors import RecipeError
from qinit.snndlft.metrics import measured, require_metric


@pytest.mark.parametrize(
    ("metric", "true", "found", "expected"),
    [
        ("accuracy", [0, 1, 2, 2], [0, 1, 1, 2], 0.75),
        ("f1", [0, 0, 1, 1, 1], [0, 1, 1, 1, 0], 2 * 2 / (2 * 2 + 1 + 1)),  # of class 1
        ("f1", [0, 1, 2], [0, 2, 2], (1 + 0 + 2 / 3) / 3),  # mean over classes
        ("matthews", [0, 0, 1, 1, 1], [0, 1, 1, 1, 0], (2 * 1 - 1 * 1) / (3 * 3 * 2 * 2) ** 0.5),
        ("matthews", [0, 1, 2], [1, 1, 1], 0.0),
    ],
)
def test_metrics(metric, true, found, expected):
    classes = max(true) + 1
    assert measured(metric, np.array(true), np.array(found), classes) == pytest.approx(expected)


def test_an_unknown_metric_is_named():
    with pytest.raises(RecipeError, match=r"metric: unknown 'acuracy' \(did you mean 'accuracy'\?\); known are"):
        require_metric("acuracy")
