import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cleaning(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bundled_cleaning

    yield bundled_cleaning
    sys.modules.pop("bundled_cleaning", None)


def test_hard_wrapped_lines_become_paragraphs_and_verse_stays(cleaning):
    text = "  It was a dark\nnight.\n\n   ***\n\n     How doth\n     the little\n\nThe end\n"
    assert cleaning.prose(text) == "It was a dark night.\n\nHow doth\nthe little\n\nThe end"


@pytest.mark.parametrize(
    ("head", "kept"),
    [
        ("/* Copyright someone */\n\n", ""),
        ("/* What this does */\n", "/* What this does */\n"),
        ("// Licensed under MIT\n// by someone\n\n", ""),
        ("# SPDX-License-Identifier: MIT\n\n", ""),
        ("#include <a.h>\n", "#include <a.h>\n"),
    ],
)
def test_a_licence_at_the_head_of_code_goes(cleaning, head, kept):
    assert cleaning.code(f"{head}code // copyright\n") == f"{kept}code // copyright\n"


def test_a_page_of_the_declaration_is_its_headings_and_paragraphs(cleaning):
    page = "<title>no</title><h1>All &amp;\n all</h1><p>One,</p><ol><li>\n <p>two</p></li><li>three</li></ol>"
    assert cleaning.declaration(page) == "All & all\n\nOne,\n\ntwo\n\nthree"


def test_pictures_and_comments_leave_documentation(cleaning):
    page = "# Title[⬆](#top)<!-- made\nby hand -->\n[![badge](a.svg)](b)\n<img src='a'>\nText.\n"
    assert cleaning.markup(page) == "# Title\nText.\n"


def test_messages_with_gaps_and_short_ones_are_left_out(cleaning):
    long = "A message that is long enough to be a whole sentence, and then some more."
    assert cleaning.messages(f'{{"a": "Short.", "b": "{long}", "c": "{long} {{0}}"}}') == long
