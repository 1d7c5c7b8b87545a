import json
import os

import pytest
import torch

from qinit.errors import OutputError, ReportError
from qinit.evaluate.figures import Figures
from qinit.evaluate.job import Way
from qinit.evaluate.saved import check_savable, row_of, save
from qinit.evaluate.text import Text, Tokens
from qinit.evaluate.windows import cut_windows
from qinit.files.manifest import MANIFEST_NAME, file_sum, read_manifest, write_manifest
from qinit.report.card import with_evaluations
from qinit.report.report import Report
from tests.helpers import quantize

WINDOWS = cut_windows(torch.arange(40), 10, 4)
FIGURES = Figures(39, 2.5, 2.25, 0.125, 0.75)


def row(text="a.txt", windows=WINDOWS, figures=FIGURES, **way):
    way = Way(**{"streamed": False, "reason": "", "dtype": "float32", "batch_size": 2, **way})
    return row_of(Text(text, "", "one text"), Tokens(torch.empty(0), "no special tokens"), windows, way, figures, "m")


@pytest.fixture
def run(tiny_llama, tmp_path):
    quantize(tiny_llama, tmp_path / "run", format="dense")
    write_manifest(tmp_path / "run")
    return tmp_path / "run"


def rows(run):
    return Report.read(run).totals["evaluations"]


def test_a_row_says_what_was_measured_and_how():
    assert row() == {
        **{"text": "a.txt", "length": 10, "stride": 4, "windows": 9, "tokens": 39, "joined": "one text"},
        **{
            "special_tokens": "no special tokens",
            "perplexity": pytest.approx(12.182494),
            "loss": 2.5,
            "reference": "m",
        },
        **{"reference_perplexity": pytest.approx(9.487736), "kl": 0.125, "top1_agreement": 0.75},
        **{"dtype": "float32", "streamed": False},
    }
    assert json.loads(json.dumps(row())) == row()


def test_rows_go_into_the_report_and_an_older_one_of_the_same_measurement_goes(run):
    assert save(run, row(), {}) == ["qinit.json", "README.md"]
    save(run, row("b.txt"), {})
    save(run, row(windows=cut_windows(torch.arange(40), 10)), {})
    newer = row(figures=Figures(39, 3.0), streamed=True)
    save(run, newer, {})
    assert [(one["text"], one["stride"]) for one in rows(run)] == [("b.txt", 4), ("a.txt", None), ("a.txt", 4)]
    assert rows(run)[-1] == newer


def test_all_else_in_the_report_stays_even_what_this_qinit_does_not_know(run):
    file = run / "qinit.json"
    before = {**json.loads(file.read_text()), "of a later qinit": [1, 2]}
    file.write_text(json.dumps(before))
    save(run, row(), {})
    after = json.loads(file.read_text())
    assert after["totals"].pop("evaluations") == [row()]
    assert after == before


def test_the_list_of_sums_follows_and_vouches_for_the_rest(run):
    before = read_manifest(run)
    save(run, row(), {})
    after = read_manifest(run)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"qinit.json", "README.md"}
    assert all(after[name] == file_sum(run / name) for name in after)
    assert not list(run.glob(".*"))


class TestCard:
    def test_it_gets_a_table_in_front_of_the_recipe(self, run):
        before = (run / "README.md").read_text()
        save(run, row(), {})
        after = (run / "README.md").read_text()
        start, end = after.index("## Perplexity\n"), after.index("## Recipe\n")
        assert after[:start] + after[end:] == before
        assert (
            "| a.txt | 12.182 | 9.488 | 0.1250 | 0.7500 | 9 windows of 10 tokens that start 4 apart" in after[start:end]
        )
        assert "39 tokens predicted; one text; no special tokens; float32 |\n" in after[start:end]

    def test_writing_it_again_changes_nothing_and_a_new_figure_one_line(self, run):
        save(run, row(), {})
        once = (run / "README.md").read_text()
        save(run, row(), {})
        assert (run / "README.md").read_text() == once
        save(run, row(figures=Figures(39, 3.0)), {})
        pairs = zip(once.splitlines(), (run / "README.md").read_text().splitlines(), strict=True)
        changed = [new for old, new in pairs if old != new]
        assert len(changed) == 1
        assert changed[0].startswith("| a.txt | 20.086 | - | - | - | 9 windows")

    def test_what_its_owner_wrote_stays(self, run):
        save(run, row(), {})
        card = run / "README.md"
        card.write_text(
            card.read_text().replace("## Measured", "## Mine\nText.\n\n## Measured") + "\n## Thanks\nTo all.\n"
        )
        mine = card.read_text()
        save(run, row(), {})
        assert card.read_text() == mine

    def test_a_card_without_a_recipe_gets_it_at_its_end_and_a_missing_one_is_not_made(self, run):
        assert with_evaluations("# Mine\n", {"evaluations": [row()]}).startswith("# Mine\n## Perplexity\n| text |")
        assert with_evaluations("# Mine\n", {}) == "# Mine\n"
        (run / "README.md").unlink()
        assert save(run, row(), {}) == ["qinit.json"]
        assert not (run / "README.md").exists()

    def test_tasks_have_a_table_of_their_own(self, run):
        save(run, None, {"arc_easy": {"acc,none": 0.5, "acc_stderr,none": 0.01}})
        save(run, row(), {"piqa": {"acc,none": 0.25}})
        assert list(json.loads((run / "qinit.json").read_text())["totals"]["tasks"]) == ["arc_easy", "piqa"]
        card = (run / "README.md").read_text()
        assert "## Tasks\n| task | metric | value |\n|---|---|---|\n| arc_easy | acc,none | 0.5000 |\n" in card
        assert "| piqa | acc,none | 0.2500 |\n" in card
        assert card.index("## Perplexity") < card.index("## Recipe")
        assert card.count("## Tasks") == card.count("## Perplexity") == 1

    def test_bars_in_a_name_do_not_end_a_cell(self):
        assert "| a\\|b |" in with_evaluations("", {"evaluations": [row("a|b")]})


class TestDamage:
    def test_a_damaged_report_or_list_is_found_before_anything_is_written(self, run):
        (run / MANIFEST_NAME).write_text("nonsense\n")
        before = (run / "qinit.json").read_bytes()
        for act in (lambda: check_savable(run), lambda: save(run, row(), {})):
            with pytest.raises(ReportError, match="damaged"):
                act()
        assert (run / "qinit.json").read_bytes() == before
        (run / "qinit.json").write_text("{")
        with pytest.raises(ReportError, match="not JSON"):
            check_savable(run)

    def test_a_directory_that_cannot_be_written_to(self, run, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(OutputError, match="cannot be written to; --no-save leaves the run as it is"):
            check_savable(run)

    def test_a_full_disk_leaves_the_old_file(self, run, monkeypatch):
        before = {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()}

        def full(*_arguments, **_options):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("pathlib.Path.write_text", full)
        with pytest.raises(OutputError, match=r"qinit.json: cannot be written \(No space left.*\); it is as it was"):
            save(run, row(), {})
        assert {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()} == before
