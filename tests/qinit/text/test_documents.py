import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qinit.text.documents import read_file
from tests.fuzz import changed, changes, examples, file_of, json_values, only_qinit_errors
from tests.models import words
from tests.qinit.text.loading import load, refusal, write_rows


class TestJsonl:
    def test_its_documents_are_one_stream(self, reader, tmp_path):
        path = write_rows(tmp_path / "a.jsonl", {"text": words(4, 5, 6)}, {"text": words(7, 8)}, {"text": words(9)})
        assert load(path, reader, length=2).tokens.tolist() == [[4, 5], [6, 7], [8, 9]]

    def test_the_text_can_be_in_another_field_and_another_suffix(self, reader, tmp_path):
        path = write_rows(tmp_path / "a.json", {"body": words(4, 5), "text": 7})
        assert load(path, reader, length=2, text_field="body").tokens.tolist() == [[4, 5]]

    def test_blank_lines_null_and_line_separators_within_strings_are_fine(self, reader, tmp_path):
        path = write_rows(tmp_path / "a.jsonl", {"text": None}, {"text": "w4\u2028w5"})
        path.write_text("\n" + path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
        assert load(path, reader, length=2).tokens.tolist() == [[4, 5]]

    def test_a_missing_field_is_named_with_the_line_and_the_fields_there_are(self, reader, tmp_path):
        path = write_rows(tmp_path / "a.jsonl", {"text": "w4"}, {"texts": "w4", "id": 1})
        message = refusal(path, reader, planned=False)
        assert message == (
            f"{path}, line 2: no field 'text' (did you mean 'texts'?); its fields are texts, id; "
            "choose one with --text-field"
        )

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{nonsense", r"line 2: not valid JSON (Expecting property name"),
            ("[1]", "line 2: expected an object with a field 'text', found list"),
            (
                '{"text": 7, "body": "w4"}',
                "line 2: field 'text' holds int, expected text; choose another of text, body",
            ),
            ("{}", "line 2: no field 'text'; its fields are none"),
        ],
    )
    def test_a_line_that_is_no_document_is_named(self, reader, tmp_path, line, message):
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "w4"}\n' + line + "\n")
        assert f"{path}, {message}" in refusal(path, reader, planned=False)

    def test_documents_without_text_are_an_error(self, reader, tmp_path):
        path = write_rows(tmp_path / "a.jsonl", {"text": ""}, {"text": " \n"})
        assert refusal(path, reader, planned=False) == f"{path}: field 'text' holds no text in any of its rows"


def test_a_directory_is_no_source(reader, tmp_path, monkeypatch):
    assert refusal(tmp_path, reader) == f"{tmp_path}: is a directory; give one text file or JSONL file"
    monkeypatch.chdir(tmp_path.parent)
    assert "no such file" in refusal(f"{tmp_path.name}:part", reader)  # `datasets` would read the directory


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no text (it is empty)"),
        (b" \n\t\n", "holds no text"),
        (b"w4 \xff\xfe", "not UTF-8 text (byte 3 cannot be decoded); convert it"),
    ],
)
def test_a_file_without_text(reader, tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    assert refusal(tmp_path / "a.txt", reader).startswith(f"{tmp_path / 'a.txt'}: {message}")


def test_a_file_that_cannot_be_read(reader, text, monkeypatch):
    def fail(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("qinit.text.documents.read_regular", fail)
    assert refusal(text, reader).startswith(f"{text}: cannot be read (Permission denied); give one text file")


def test_a_file_too_large_to_be_read_whole(reader, text, monkeypatch):
    monkeypatch.setattr("qinit.text.documents.LARGEST_FILE", 100)
    assert "an excerpt is enough" in refusal(text, reader)


@examples(50)
@given(
    st.sampled_from(["a.txt", "a.jsonl"]),
    st.binary(max_size=40)
    | st.lists(json_values, max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
    | st.builds(changed, st.just(b'{"text": "w5 w6", "n": [1, {"a": null}]}\n\n{"text": "w7"}\n'), changes),
)
def test_fuzz_bytes_are_documents_or_refused(name, raw):
    with file_of(raw, name) as file, only_qinit_errors():
        documents = read_file(file)
        assert any(document.strip() for document in documents)
        "".join(documents).encode()
