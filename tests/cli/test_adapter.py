import json

import pytest

from tests.helpers import contents
from tests.others import packed_base


@pytest.fixture
def base(llama, tmp_path):
    return packed_base(llama, tmp_path / "base", "gptq")


def test_an_adapter_is_made_verified_and_no_run(command, llama, base):
    before = contents(base)
    arguments = (base, "--source", llama, "--rank", 4, "--out", "out")
    code, out, err = command("adapter", *arguments, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["totals"]["base"]["name"] == str(base)
    assert report["totals"]["error"] < report["totals"]["error_start"]
    assert contents(base) == before
    assert command("verify", "out", "--source", llama)[0] == 0
    for name, more in (("polish", ()), ("push", ("a/b", "--dry-run")), ("trainer-config", ("--trainer", "trl"))):
        code, _, err = command(name, "out", *more)
        assert (code, "holds an adapter alone" in err, err.count("\n")) == (2, True, 1), (name, err)
    code, _, err = command("adapter", *arguments)
    assert (code, "exists; pass --overwrite" in err) == (2, True)
    assert command("adapter", *arguments, "--overwrite", "--quiet")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("nowhere", "--source", "LLAMA"), "nowhere"),
        (("LLAMA", "--source", "LLAMA"), "is not quantized"),
        (("BASE", "--source", "LLAMA", "--rank", 64), "rank: 64 is beyond"),
        (("BASE", "--source", "LLAMA", "--method", "qpissa"), "chooses Q itself"),
        (("BASE", "--source", "LLAMA", "--method", "eorra"), "did you mean 'eora'"),
        (("BASE", "--source", "LLAMA", "--out", "BASE/x"), "lies in the base"),
    ],
)
def test_bad_input_is_one_line(arguments, what, command, llama, base, tmp_path):
    words = [str(word).replace("LLAMA", str(llama)).replace("BASE", str(base)) for word in arguments]
    words += [] if "--out" in words else ["--out", str(tmp_path / "out")]
    code, out, err = command("adapter", *words)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert what in err
    assert not (tmp_path / "out").exists()
