import pytest

from qinit.errors import CheckpointError, HubError
from qinit.hub.errors import LONGEST, UNREADABLE, checked_token, hub_errors, without_token

SECRET = "hf_secret"


def said(error, doing="push", token=SECRET):
    with pytest.raises((HubError, CheckpointError)) as caught, hub_errors("me/x", None, token, doing):
        raise error
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__  # nor does --debug show what may hold the token
    return str(caught.value)


@pytest.mark.parametrize("token", [None, "", "  \n"])
def test_no_token_is_left_to_huggingface_hub(token):
    assert checked_token("x", token) is None


def test_a_token_is_sent_without_the_line_end():
    assert checked_token("x", " hf_a\n") == "hf_a"


@pytest.mark.parametrize("token", ["hf_a b", "hf_a\nhf_b", "hf_ä", "hf_\x00"])
def test_a_token_that_cannot_be_sent_is_not_shown(token):
    with pytest.raises(HubError, match=r"^me/x: the Hub token holds characters that no token has") as caught:
        checked_token("me/x", token)
    assert token not in str(caught.value)


def test_both_tokens_are_starred_in_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_other")
    assert without_token("a hf_secret\n\tb hf_other", SECRET) == "a *** b ***"


@pytest.mark.parametrize("doing", ["download", "push"])
@pytest.mark.parametrize("kind", [OSError, RuntimeError, ValueError, KeyError, TypeError, ConnectionResetError])
def test_anything_that_goes_wrong_is_one_line_without_the_token(kind, doing):
    text = said(kind(f"Bearer {SECRET}\nand more"), doing)
    what = (
        "the Hub's answer cannot be used"
        if doing == "download" and issubclass(kind, UNREADABLE)
        else f"the {doing} failed"
    )
    assert text.startswith(f"me/x: {what} ({kind.__name__}: ")
    assert "***" in text
    assert SECRET not in text
    assert "\n" not in text


def test_a_page_of_a_proxy_is_cut():
    assert len(said(OSError("<html>" * 1000))) < LONGEST + 100


def test_the_reason_is_named_and_not_the_file_that_it_happened_to():
    error = RuntimeError("Error while uploading 'model.safetensors' to the Hub.")
    error.__cause__ = ConnectionResetError("Connection reset by peer")
    assert said(error) == "me/x: the push failed (ConnectionResetError: Connection reset by peer)"


def test_an_error_of_qinit_passes():
    with pytest.raises(CheckpointError, match=r"^x$"), hub_errors("me/x", None, None):
        raise CheckpointError("x")
