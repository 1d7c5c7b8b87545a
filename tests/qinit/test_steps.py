from qinit.steps import finish, told
from tests.helpers import exhausted


def counting():
    yield 1
    yield 2
    return "three"


def test_each_step_is_told_in_other_words_and_the_result_is_returned():
    assert exhausted(told(counting(), lambda step: 10 * step)) == ("three", [10, 20])


def test_what_is_broken_off_takes_no_further_step():
    seen = []
    steps = told(counting(), seen.append)
    next(steps)
    steps.close()
    assert seen == [1]


def test_only_the_result_of_what_is_finished_counts():
    assert finish(counting()) == "three"
