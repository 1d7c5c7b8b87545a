import json

import pytest

from qinit.errors import CalibrationError, DatasetError
from qinit.snndlft.labelled import Labelled, read_labelled


def written(place, name, text):
    file = place / name
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'one,two,kind\n"a, b",c,10\nd,e,9\nf,g,9\nh,i,10\n'),
        ("a.tsv", 'one\ttwo\tkind\na, b\tc\t10\nd\te\t9\nf\tg\t9\nh\ti\t10\n'),
        ("a.jsonl", "\n".join(json.dumps(dict(zip(("one", "two", "kind"), row, strict=True)))
                              for row in [("a, b", "c", 10), ("d", "e", 9), ("f", "g", 9), ("h", "i", 10)])),
    ],
)  # fmt: skip
def test_the_forms_of_glue_are_read_alike(tmp_path, name, text):
    found = read_labelled(written(tmp_path, name, text), ("one", "two"), "kind")
    assert found == Labelled([("a, b", "c"), ("d", "e"), ("f", "g"), ("h", "i")], [1, 0, 0, 1], ("9", "10"))


def test_quotes_in_a_tsv_quote_nothing_and_truth_is_a_class(tmp_path):
    found = read_labelled(written(tmp_path, "a.tsv", 's\tk\n"a\tx\n"b\ty\nc\tx\nd"\ty\n'), ("s",), "k")
    assert [text for (text,) in found.texts] == ['"a', '"b', "c", 'd"']
    lines = "\n".join(json.dumps({"s": "t", "k": value}) for value in (True, False, True, False))
    assert read_labelled(written(tmp_path, "b.jsonl", lines), ("s",), "k").classes == ("false", "true")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "sentense,k\na,0\nb,1\n", "row 1: no column 's'; its columns are sentense, k"),
        ("a.csv", "s,k\na,0.5\nb,1.5\nc,2\nd,2\n", "holds numbers such as 0.5, which are no classes"),
        ("a.csv", "s,k\n" + "".join(f"a,{i}\n" for i in range(9)), "9 different values in 9 rows, which are no class"),
        ("a.csv", "s,k\na,0\nb,0\n", "has 1 different values in 2 rows"),
        ("a.csv", "s,k\na,0\nb\n", "row 2: has another number of columns than the first line"),
        ("a.csv", "s,k\na,\nb,1\n", "row 1: column 'k' holds '', which is no class"),
        ("a.csv", "s,k\n", "has no rows below"),
        ("a.txt", "words", "expected a .csv, .tsv or .jsonl file with a column of classes"),
        ("a.jsonl", '{"s": 3, "k": 1}', "line 1: column 's' holds int, expected text"),
        ("a.jsonl", '{"s": "a", "k": [1]}', r"line 1: column 'k' holds [1], which is no class"),
        ("a.jsonl", "{", "line 1: not valid JSON"),
        ("a.jsonl", "[]", "line 1: expected an object, found list"),
    ],
)
def test_what_is_no_labelled_text_is_one_line(tmp_path, name, text, words):
    with pytest.raises(DatasetError) as error:
        read_labelled(written(tmp_path, name, text), ("s",), "k")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_validation_has_no_other_classes(tmp_path):
    file = written(tmp_path, "a.csv", "s,k\na,0\nb,2\n")
    with pytest.raises(DatasetError, match=r"row 2: class '2' is not among those that are trained \(0, 1\)"):
        read_labelled(file, ("s",), "k", ("0", "1"))
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_labelled(tmp_path / "none.csv", ("s",), "k")
