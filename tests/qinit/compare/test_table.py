from dataclasses import replace

import pytest

from qinit.compare.comparison import LORA, Cell
from qinit.compare.table import document, failures, header, lines, rows, sweep_lines, title
from tests.qinit.compare.comparisons import comparison, found_for, result_of


class TestTable:
    def test_means_spreads_and_differences_seed_by_seed(self):
        made = comparison()
        lora, loftq, _ = rows(made, found_for(made))
        assert lora["rate"] == loftq["rate"] == 0.1
        assert lora["end"]["one | two"] == {"mean": 12, "spread": 1, "seeds": {"0": 11, "1": 12, "2": 13}}
        assert loftq["end"]["other"]["mean"] == 26
        assert loftq["to_lora"] == {"one | two": pytest.approx(13 / 12), "other": pytest.approx(26 / 24)}
        assert loftq["less_lora"]["one | two"] == {"mean": 1, "spread": 0}
        assert loftq["start"] == {"one | two": 21, "other": 30}

    def test_a_seed_that_is_missing_is_left_out_of_the_pairs(self):
        made = comparison()
        found = found_for(made)
        found[Cell(made.rows[1], 0.1, 1)] = {"failed": "no room"}
        loftq = rows(made, found)[1]
        assert loftq["end"]["one | two"]["seeds"] == {"0": 12, "2": 14}
        assert loftq["less_lora"]["one | two"]["mean"] == 1
        assert loftq["failed"] == ["no room"]

    def test_nothing_yet_is_a_dash(self):
        made = comparison()
        result = result_of(made, {})
        assert lines(result)[1] == ["2", "loftq", "2.500", *["-"] * 9]
        assert len(header(result)) == 12
        assert failures(result) == []

    def test_what_is_trained_is_a_column_where_it_was_counted_and_16_bit_lora_is_at_16_bits_alone(self):
        made = comparison()
        low = replace(made.rows[1], method=LORA)
        made = replace(made, rows=(low, *made.rows))
        found = found_for(made)
        found[Cell(low)]["trainable"] = 12345
        result = result_of(made, found)
        assert [line[1] for line in lines(result)] == ["lora", "16-bit LoRA", "loftq", "loftq"]
        assert [line[header(result).index("trained")] for line in lines(result)] == ["12,345", "-", "-", "-"]
        assert result["rows"][1]["less_lora"]["other"]["mean"] == 0

    def test_every_learning_rate_is_shown(self):
        made = comparison()
        found = found_for(made)
        found[Cell(made.rows[1], 0.2, 0)] = {"diverged": "at step 2", "validation": None, "perplexities": None}
        swept = sweep_lines(result_of(made, found))
        assert swept[2] == ["2", "loftq", "0.1", "13.000", "12.000", "24.000", "yes"]
        assert swept[3] == ["2", "loftq", "0.2", "-", "-", "-", "diverged"]

    def test_markdown_keeps_its_columns(self):
        made = comparison()
        result = result_of(made, found_for(made))
        text = document(result)
        assert "start one \\| two" in text
        for line in text.splitlines():
            if line.startswith("| 2 |"):
                assert line.replace("\\|", "").count("|") in (len(header(result)) + 1, 8)
        assert title(result) in text
