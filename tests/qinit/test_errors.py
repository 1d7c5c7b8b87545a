from qinit.errors import did_you_mean


def test_suggests_the_closest_name():
    assert did_you_mean("q_prj", ["k_proj", "q_proj"]) == " (did you mean 'q_proj'?)"


def test_suggests_nothing_when_nothing_is_close():
    assert did_you_mean("banana", ["q_proj"]) == ""
    assert did_you_mean("banana", []) == ""
