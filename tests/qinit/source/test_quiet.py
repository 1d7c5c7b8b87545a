import pytest
from transformers.utils import logging

from qinit.source.quiet import no_progress_bar


@pytest.fixture(autouse=True)
def as_before():
    shown = logging.is_progress_bar_enabled()
    yield
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()


@pytest.mark.parametrize("shown", [True, False])
def test_the_bar_is_off_meanwhile_and_as_the_user_had_it_afterwards(shown):
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    with no_progress_bar():
        assert not logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled() is shown


def test_after_an_error_too():
    logging.enable_progress_bar()
    with pytest.raises(ZeroDivisionError), no_progress_bar():
        raise ZeroDivisionError
    assert logging.is_progress_bar_enabled()
