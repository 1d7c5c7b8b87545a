import json

import pytest

from tests.helpers import names
from tests.models import words

TEXT = words(*(4 + i % 200 for i in range(400)))
ROWS = "sentence,kind\n" + "".join(f"{words(4 + i, 5)},{i % 2}\n" for i in range(40))
SMALL = ("--init-r", 4, "--target-r", 2, "--length", 8, "--device", "cpu")


@pytest.fixture
def files(tmp_path, command):
    """The files that are learned from, in the command's own directory."""
    place = tmp_path / "cwd"
    (place / "a.txt").write_text(TEXT)
    (place / "a.csv").write_text(ROWS)
    return place


@pytest.mark.usefixtures("files")
def test_what_is_trained_is_said_and_written(command, reader, tmp_path):
    plain = ("--no-spiking", "--layer-wise", "single", *SMALL, "--steps", 4, "--out", "out")
    code, out, err = command("snndlft", reader, "--dataset", "a.txt", *plain, "--json")
    report = json.loads(out)
    assert code == 0, err
    assert (report["totals"]["metric"], report["totals"]["layers_trained"]) == ("perplexity", 1)
    assert "step 4: loss " in err
    assert "1 of 2 layers train" in err
    assert 'Load it: qinit.snndlft.load("out")' in err
    code, out, err = command("snndlft", reader, "--dataset", "a.txt", *plain)
    assert (code, out) == (2, "")
    assert err == "error: out: exists; pass --overwrite to replace it, or choose another place with --out\n"


def test_other_commands_read_what_was_trained(command, reader, files):
    pytest.importorskip("snntorch")
    trained = (*SMALL, "--steps", 4, "--out", "out", "--dataset", "a.txt", "--validation", "a.txt", "--json")
    report = json.loads(command("snndlft", reader, *trained)[1])
    before = names(files / "out")
    assert len({path.stat().st_mode for path in (files / "out").iterdir()}) == 1  # by the umask

    (files / "out/report.html").write_text("")
    code, out, err = command("report", "out", "--json")
    assert (code, err, json.loads(out)["totals"]) == (0, "", report["totals"])
    assert "spiking AdaLoRA" in (files / "out/report.html").read_text()
    code, out, _ = command("verify", "out", "--json")
    found = json.loads(out)
    assert (code, found["sound"], found["notes"]) == (0, True, [])
    assert found["loaded"].endswith("with its spiking adapter, run over 8 tokens")
    code, out, err = command("eval", "out", "--text", "a.txt", "--length", 8, "--reference", reader, "--json")
    assert (code, "block by block" in err) == (0, False)
    measured = json.loads(out)
    assert measured["perplexity"] == pytest.approx(report["totals"]["after"], rel=1e-5)
    assert measured["perplexity"] != measured["reference_perplexity"] == pytest.approx(report["totals"]["before"])
    assert names(files / "out") == before

    for arguments, line in (
        (("push", "out", "a/b", "--dry-run"), "push it with `hf upload a/b out`"),
        (("merge", "out", "--out", "merged"), "out: is what `qinit snndlft` trained, not a run: a spiking adapter can"),
        (("eval", "out", "--text", "a.txt", "--stream", "always"), "stream: the adapter of out is run with the whole"),
        (("verify", "out", "--for", "vllm"), "out: is an adapter alone"),
        (("verify", "out", "--source", "a"), "--source: is about runs, and out is a training; leave it out"),
    ):
        code, _, err = command(*arguments)
        assert (code, line in err) == (2, True), err
    card = (files / "out/README.md").read_text()
    assert "tags:\n- qinit\n- snn-dlft\n- spiking\n- adalora\n" in card
    assert "base_model" not in card  # it is a directory of this machine


@pytest.mark.usefixtures("files")
def test_a_classifier_is_measured_on_labelled_rows_by_its_own_metric(command, reader):
    given = ("--no-spiking", *SMALL, "--steps", 3, "--label", "kind", "--columns", "sentence", "--metric", "f1")
    code, out, err = command(
        "snndlft", reader, *given, "--dataset", "a.csv", "--validation", "a.csv", "--out", "out", "--json"
    )
    assert code == 0, err
    report = json.loads(out)
    code, out, err = command("eval", "out", "--text", "a.csv", "--json")
    expected = {"metric": "f1", "value": report["totals"]["after"], "text": "a.csv", "rows": 40}
    assert (code, json.loads(out)) == (0, {"model": "out", **expected})
    assert command("verify", "out")[0] == 0
    code, _, err = command("eval", "out")
    assert (code, err) == (
        2,
        "error: out: is a classifier; give --text FILE, a .csv, .tsv or .jsonl file with sentence, kind\n",
    )
    code, _, err = command("eval", "out", "--text", "a.csv", "--reference", reader)
    assert (code, "--reference: is about language models, and out is a classifier" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("a.txt", "--target-modules", "query"), "target_modules: no adapter can be put on this LlamaForCausalLM"),
        (("a.txt", "--init-r", "40"), "init_r: 40 does not fit into model.layers.0.self_attn.v_proj, which is 32 x 64"),
        (("a.txt", "--target-r", "9"), "target_r: must be below init_r, as ranks are only taken away, found 9 and 4"),
        (("a.txt", "--deltaT", "5"), "deltaT: 5 is beyond the 4 steps of this run"),
        (("a.txt", "--tinit", "4"), "tinit, tfinal: 4 and 0 steps leave none"),
        (("a.txt", "--layer-wise", "best"), "layer_wise: input should be 'single', 'half' or 'all', found 'best'"),
        (("a.txt", "--metric", "f1"), "--metric: is about classes"),
        (("a.txt", "--columns", "a,b"), "--columns: one column of text, or with --label two, found a,b"),
        (("a.txt", "--learning-rate", "-1"), "--learning-rate: expected a number above 0, found -1.0"),
        (("none.txt",), "none.txt: cannot be read (No such file or directory)"),
        (
            ("a.csv", "--label", "kind", "--columns", "sentense"),
            "row 1: no column 'sentense' (did you mean 'sentence'?)",
        ),
        (
            ("a.csv", "--label", "sentence", "--columns", "sentence"),
            "40 different values in 40 rows, which are no class",
        ),
        (("a.csv", "--label", "kind", "--columns", "sentence", "--metric", "f2"), "metric: unknown 'f2'"),
    ],
)
def test_bad_input_is_one_line(command, reader, files, arguments, line):
    before = names(files)
    code, _, err = command(
        "snndlft", reader, "--no-spiking", *SMALL, "--steps", 4, "--out", "out", "--dataset", *arguments
    )
    last = err.splitlines()[-1]
    assert (code, names(files)) == (2, before), err
    assert last.startswith("error: ")
    assert line in last
