import pytest
import yaml

from qinit.trainers.yaml_text import scalar


@pytest.mark.parametrize(
    "text", ["/runs/a-b_c.d", "/a b/c: d", "1e4", "true", "null", "#x", "/ü/é", 'a"b', "a\\b", "-"]
)
def test_a_string_is_read_back_as_it_is(text):
    assert yaml.safe_load(f"key: {scalar(text)}  # a comment\n") == {"key": text}


def test_a_plain_path_stays_plain():
    assert scalar("/runs/Qwen2.5-7B") == "/runs/Qwen2.5-7B"
