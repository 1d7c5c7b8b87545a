from contextlib import suppress

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qinit.files.reading import YAML_BYTES, parse_yaml
from tests.fuzz import changed, changes, examples
from tests.qinit.files.test_reading import plain


class TestYaml:
    @examples(20)
    @given(plain)
    def test_what_yaml_writes_is_read(self, value):
        if isinstance(value, dict | list):
            raw = yaml.dump(value, Dumper=NoAliases).encode()
            assert parse_yaml(raw) == value

    @examples(50)
    @given(
        st.binary(max_size=60)
        | st.text(st.sampled_from("&*!<>|-?:,[]{}#'\"% \n\tab1~.e_0x@`"), max_size=30).map(str.encode)
        | st.builds(changed, st.just(b"bits: 3\nmodel: a\nlist: [1, {b: 2}]\n!!int x: &a 2024-01-02\n"), changes)
    )
    def test_fuzz_anything_else_is_a_value_error(self, raw):
        with suppress(ValueError):
            parse_yaml(raw)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a: &b 1", "line 1: 'b' is an anchor or alias; write the value itself"),
            ("a: 1\nb: *c", "line 2: 'c' is an anchor"),
            ("a: 1\nb:\n  c: 1\n  c: 2", "line 3 and on: 'c' stands there twice"),
            ("1: a\n0x1: b", "line 1 and on: a name stands there twice"),
            ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
            ("a: " + "x" * YAML_BYTES, "more than 262144 bytes"),
        ],
    )
    def test_what_is_refused(self, text, message):
        with pytest.raises(ValueError, match=message):
            parse_yaml(text.encode())


class NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data):
        return True
