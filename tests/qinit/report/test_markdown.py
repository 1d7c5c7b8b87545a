from qinit.report.markdown import table


def test_a_bar_in_a_cell_is_no_column():
    assert table(["a", "b"], [["1|2", "3"], ["", "4"]]) == "| a | b |\n|---|---|\n| 1\\|2 | 3 |\n|  | 4 |"
