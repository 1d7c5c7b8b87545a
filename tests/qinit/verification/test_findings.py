from qinit.errors import QinitError
from qinit.verification.findings import Finding, from_error


class TestFinding:
    def test_it_says_what_was_expected_and_what_was_found(self):
        assert str(Finding("a.json", "rank", 4, 8)) == "a.json: rank: expected 4, found 8"
        assert str(Finding("a.json", "the file is missing")) == "a.json: the file is missing"
        assert str(Finding("a.json", "alpha", 4, None)) == "a.json: alpha: expected 4, found nothing"

    def test_a_long_value_is_cut(self):
        assert str(Finding("f", "names", 1, "x" * 500)).endswith("x" * 200 + "...")

    def test_the_path_of_an_error_is_left_out(self, tmp_path):
        error = QinitError(f"{tmp_path / 'config.json'}: is no JSON")
        assert str(from_error(tmp_path, "config.json", error)) == "config.json: is no JSON"
        error = QinitError(f"{tmp_path}: is empty")
        assert str(from_error(tmp_path, "qinit.json", error)) == "qinit.json: is empty"
