from dataclasses import replace

from qinit.report.combined import Combined, Part, combined_card

PARTS = (Part("runs/a", "a" * 64, 0.7, 0.5), Part("runs/b", "b" * 64, 0.3, 1.0))
REPORT = Combined("me/llama-2bit", "ties", 0.5, PARTS, "c" * 64, 2.0, 14, 4, 1000, (), {}, "qinit merge --adapters a,b")


def test_the_card_says_what_was_combined_and_how():
    card = combined_card(REPORT)
    assert card.startswith("---\nbase_model: me/llama-2bit\nlibrary_name: peft\n")
    assert "made one by qinit (ties, density 0.5). What training added to the start" in card
    assert f"| runs/a | 0.7 | 0.250 of the start | `{'a' * 64}` |" in card
    assert "\nqinit merge --adapters a,b\n" in card


def test_without_a_start_sizes_stand_for_themselves_and_a_base_that_lies_here_is_no_id():
    card = combined_card(
        replace(REPORT, base="/models/base", start=None, start_size=0.0, combination="svd", density=None)
    )
    assert "base_model" not in card
    assert "(svd). No start was known: they were taken whole." in card
    assert "| runs/b | 0.3 | 1 |" in card
