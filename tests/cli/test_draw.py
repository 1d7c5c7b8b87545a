import json

import pytest
from qinit_cli.draw import Screen, size

from qinit.runner.run import run
from tests.helpers import plan_of
from tests.models import make_checkpoint


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_500_000, "2.5 MB"), (15.2e9, "15.20 GB"), (1.5e12, "1500.00 GB")],
)
def test_sizes_are_decimal(nbytes, text):
    assert size(nbytes) == text


def test_names_are_shown_as_they_are_without_markup_or_emoji(capsys):
    Screen().say("[bold]x[/bold] :smile: [/tmp/a]")
    assert capsys.readouterr().out == "[bold]x[/bold] :smile: [/tmp/a]\n"


def test_a_long_line_is_not_wrapped_in_a_file(capsys):
    Screen().say("x" * 1000)
    assert capsys.readouterr().out == "x" * 1000 + "\n"


def test_quiet_says_nothing(tiny_llama, tmp_path, capsys):
    plan, screen = plan_of(tiny_llama, iter=1), Screen(quiet=True)
    screen.say("hello")
    report = screen.follow(plan, run(plan, tmp_path / "out"))
    assert report.totals["layers"] == 14
    assert capsys.readouterr() == ("", "")


def test_a_run_is_plain_lines_and_a_table_when_the_output_is_no_terminal(tiny_llama, tmp_path, capsys):
    plan = plan_of(tiny_llama, iter=1)
    out = tmp_path / "[red]out[/red]"
    report = Screen().follow(plan, run(plan, out))
    text, errors = capsys.readouterr()
    assert errors == ""
    assert "\x1b" not in text
    assert "\r" not in text
    lines = text.splitlines()
    progress = [line for line in lines if "error" in line and "%" in line]
    assert len(progress) == 14
    assert progress[-1].startswith("100% model.layers.1.self_attn.v_proj.weight: error 0.")
    for shown in (
        f"{report.totals['bits_per_weight']:.3f} as stored",
        f"{report.totals['error_start']:.4f} base alone -> {report.totals['error']:.4f} with the adapter",
        f"{size(report.totals['bytes_before'])} -> ",
        str(out),
        "peak memory",
        "time",
    ):
        assert shown in text
    assert lines[-4] == "Load it:"
    assert lines[-1].startswith("    model = PeftModel.from_pretrained(base, ")


def test_kept_layers_and_lowered_ranks_are_said_before_and_during_the_run(tmp_path, capsys):
    plan = plan_of(make_checkpoint(tmp_path / "m", intermediate_size=80), rank=48, iter=1)
    Screen().follow(plan, run(plan, tmp_path / "out"), plan.notes)
    text = capsys.readouterr().out
    assert "note: 4 modules named gate_proj and up_proj stay as they are: 80 x 64 is not divisible by 32\n" in text
    assert "note: model.layers.0.self_attn.k_proj: rank lowered from 48 to 32" in text
    assert "model.layers.0.mlp.up_proj.weight: kept, " in text
    assert "8 (+ 6 kept)" in text


def test_an_interrupt_while_drawing_ends_the_run_and_keeps_what_is_finished(tiny_llama, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    plan, screen = plan_of(tiny_llama, iter=1), Screen()
    monkeypatch.setattr(screen, "say", interrupt)
    place = tmp_path / "place"
    with pytest.raises(KeyboardInterrupt) as caught:
        screen.follow(plan, run(plan, place / "out"))
    left = place / ".out.partial"
    assert list(place.iterdir()) == [left]
    assert sorted(path.name for path in left.iterdir()) == ["journal", "run"]  # while `caught` keeps the frames alive
    assert caught


def test_json_is_one_line_with_the_report(tiny_llama, tmp_path, capsys):
    plan, screen = plan_of(tiny_llama, iter=1), Screen(to_stderr=True)
    report = screen.follow(plan, run(plan, tmp_path / "out"))
    screen.json_report(report, tmp_path / "out")
    text, others = capsys.readouterr()
    value = json.loads(text)
    assert value.pop("directory") == str(tmp_path / "out")
    assert value == json.loads((tmp_path / "out/qinit.json").read_text())
    assert "Load it:" in others


def test_a_block_without_a_chosen_layer_is_passed(tiny_llama, tmp_path, capsys):
    plan = plan_of(tiny_llama, calibration="random", target_modules=r"model\.layers\.0\..*", iter=1)
    assert Screen().follow(plan, run(plan, tmp_path / "out")).totals["layers"] == 7
