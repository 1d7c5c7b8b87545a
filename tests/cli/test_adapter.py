import json
from pathlib import Path

import pytest
import yaml

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
    code, _, err = command("polish", "out")
    assert (code, "holds an adapter alone" in err, err.count("\n")) == (2, True, 1), err
    code, text, err = command("trainer-config", "out", "--trainer", "axolotl")
    assert code == 0, err
    settings = yaml.safe_load(text)
    places = [str(base), str(Path("out").resolve()), True]
    assert [settings[key] for key in ("base_model", "lora_model_dir", "gptq")] == places
    code, _, err = command("adapter", *arguments)
    assert (code, "exists; pass --overwrite" in err) == (2, True)
    assert command("adapter", *arguments, "--overwrite", "--quiet")[0] == 0


def test_a_start_is_made_verified_and_an_adapter_alone_where_the_base_stays(command, reader):
    before = contents(reader)
    code, out, err = command("adapter", reader, "--method", "dora", "--alpha", 8, "--rank", 4, "--out", "a", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["totals"]["base"]["name"] == str(reader)
    assert report["totals"]["error"] == report["totals"]["error_start"] == 0
    assert command("verify", "a", "--source", reader)[0] == 0
    code, _, err = command("polish", "a")
    assert (code, "a run is needed, with the base that it wrote" in err, err.count("\n")) == (2, True, 1), err
    code, out, err = command("push", "a", "me/x", "--dry-run")
    assert (code, err) == (0, "")
    assert f"note: the base is not named, as {reader} is a place on this machine" in out
    code, _, err = command("adapter", reader, "--method", "pissa", "--niter", 4, "--rank", 4, "--out", "b", "--quiet")
    assert code == 0, err
    assert command("verify", "b", "--source", reader)[0] == 0
    assert contents(reader) == before


def test_a_start_on_a_base_that_others_have_quantized_needs_no_source(command, base):
    code, _, err = command("adapter", base, "--method", "rslora", "--rank", 4, "--out", "a", "--quiet")
    assert code == 0, err
    assert command("verify", "a", "--source", base)[0] == 0
    report = json.loads(Path("a/qinit.json").read_text())
    assert (report["totals"]["base"]["form"], report["layers"][0]["bits"]) == ("gptq", 4)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("LLAMA",), "name a start that `qinit methods` lists, or give --source"),
        (("LLAMA", "--method", "pisa"), "did you mean 'pissa'"),
        (("LLAMA", "--method", "loftq"), "rounds the base, so give --bits"),
        (("LLAMA", "--method", "pissa", "--rank", 33), "rank: 33 is beyond model.layers.0.self_attn.k_proj"),
        (("LLAMA", "--method", "lora-ga", "--rank", 17), "rank: 17 is beyond model.layers.0.self_attn.k_proj"),
        (("LLAMA", "--method", "olora", "--bits", 5), "method olora offers 2, 3, 4, 8 or 16, found 5"),
        (("LLAMA", "--method", "olora", "--bits", 4, "--grid", "in"), "grid: no 'in' (did you mean 'int'?)"),
        (("LLAMA", "--method", "olora", "--grid", "nf"), "in fewer than 16 bits"),
        (("LLAMA", "--method", "olora", "--niter", 4), "niter: is about pissa alone, found method olora"),
        (("LLAMA", "--method", "corda", "--calibration", "none"), "method corda needs it"),
        (("LLAMA", "--method", "dora", "--polish", 4), "polish: method dora stays as it starts"),
        (("LLAMA", "--method", "lora", "--target-modules", "q_prj"), "did you mean 'q_proj'"),
        (("BASE", "--method", "pissa"), "is already quantized"),
        (("BASE", "--method", "dora"), "PEFT puts no dora on layers packed as GPTQ"),
        (("BASE", "--source", "LLAMA", "--method", "olora"), "chooses Q itself"),
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
