import contextlib
import functools
import io
import json
import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import torch

from qinit.compare import measure, workers
from qinit.train import finetune
from tests.compared import STARTS, TEXT, TUNING, cells, result
from tests.forking import run_command
from tests.models import words


@pytest.mark.usefixtures("undrawn")
def test_starts_of_16_bits_are_where_the_model_is(compare):
    names = ("--methods", "dora,olora", "--bits", 16, "--ceilings", "lora", *STARTS[4:])
    code, _, err = compare(*names, "--finetune", 1, *TUNING[2:-6], "--learning-rates", 0.001, "--seeds", 0)
    assert (code, err) == (0, "")
    lora, dora, olora = result()["rows"]
    assert [(row["method"], row["bits"]) for row in (lora, dora, olora)] == [("lora", 16), ("dora", 16), ("olora", 16)]
    for row in (dora, olora):
        assert row["start"]["test.txt"] == pytest.approx(lora["start"]["test.txt"], rel=1e-3)
        assert row["end"]["test.txt"]["mean"] > 0
    assert dora["trainable"] > olora["trainable"] == lora["trainable"]


class TestTable:
    @pytest.fixture
    def orders(self, monkeypatch):
        """Record which windows each fine-tuning saw in which order, by seed."""
        seen = []
        draw = finetune.batches

        def record(count, training, seed):
            order = list(draw(count, training, seed))
            seen.append((seed, tuple(map(tuple, order))))
            return iter(order)

        monkeypatch.setattr("qinit.train.finetune.batches", record)
        return seen

    def test_starts_and_ends(self, compare, orders):
        code, out, err = compare(*STARTS, *TUNING)
        assert (code, err) == (0, "")
        lora, full, loftq, eqft = result()["rows"]
        assert [(row["method"], row["bits"]) for row in (lora, full, loftq, eqft)] == [
            *[("lora", 16), ("full", 16), ("loftq", 2), ("eqft:none", 2)]
        ]
        assert [row["bits_per_weight"] for row in (lora, full, loftq)] == [16, 16, 2.5]
        assert 2.25 < eqft["bits_per_weight"] < 3.5  # as GPTQ stores it, group indices and all
        assert lora["start"] == full["start"]
        assert eqft["weight_error"] < loftq["weight_error"]
        for row in (lora, full, loftq, eqft):
            assert [one["rate"] for one in row["rates"]] == ([1e-4, 1e-3] if row is full else [1e-3, 1e-2])
            best = min(row["rates"], key=lambda one: one["validation"])
            assert row["rate"] == best["rate"]
            end = row["end"]["test.txt"]
            values = list(end["seeds"].values())
            assert list(end["seeds"]) == ["0", "1"]
            assert end["seeds"]["0"] == best["end"]["test.txt"]
            assert end["mean"] == pytest.approx(sum(values) / 2)
            assert end["spread"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
            differences = [end["seeds"][seed] - lora["end"]["test.txt"]["seeds"][seed] for seed in ("0", "1")]
            assert row["less_lora"]["test.txt"]["mean"] == pytest.approx(sum(differences) / 2, abs=1e-9)
            assert row["to_lora"]["test.txt"] == pytest.approx(end["mean"] / lora["end"]["test.txt"]["mean"])
            assert row["failed"] == []
        assert lora["less_lora"]["test.txt"] == {"mean": 0, "spread": 0}
        # Every row saw the same windows in the same order, for each seed.
        assert len(orders) == 12
        assert len(set(orders)) == len({seed for seed, _ in orders}) == 2
        lines = [line.split() for line in out.splitlines()]
        assert ["bits", "method", "bits/weight", "trained"] in [line[:4] for line in lines]
        counted = f"{loftq['trainable']:,}"
        assert lora["trainable"] == loftq["trainable"] < full["trainable"]
        assert ["2", "loftq", "2.500", counted, f"{loftq['start']['test.txt']:.3f}"] in [line[:5] for line in lines]
        assert "16/16" in out
        markdown = Path("out/compare.md").read_text()
        assert f"| 2 | loftq | 0.001 | {loftq['rates'][0]['validation']:.3f} |" in markdown
        assert Path("out/compare.png").read_bytes()[1:4] == b"PNG"
        page = Path("out/compare.html").read_text()
        assert "eqft:none, 2 bits" in page
        assert "llama: methods side by side" in page
        assert not list(Path("out/cells").rglob("run"))  # nothing is left to be done from them
        assert str(Path.cwd()) not in Path("out/compare.json").read_text()

    def test_starts_alone(self, compare, undrawn):
        code, out, err = compare(*STARTS, "--windows", 3, "--keep-runs", "--json")
        assert code == 0
        found = json.loads(out)
        assert [row["method"] for row in found["rows"]] == ["full", "loftq", "eqft:none"]
        assert found["texts"][0]["tokens"] == 48
        assert (found["training"], found["rows"][1]["rates"], found["rows"][1]["end"]) == (None, [], None)
        assert found == result()
        assert "full precision" in err
        assert (Path("out/cells/loftq-2bit/run/qinit.json")).is_file()
        assert not Path("out/compare.png").exists()

    def test_the_start_is_what_stock_loaders_load(self, compare, strong_reader, undrawn):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from qinit.evaluate.figures import perplexity

        assert compare(*STARTS, "--keep-runs", "--quiet") == (0, "", "")
        tokens = torch.tensor(AutoTokenizer.from_pretrained(strong_reader)(TEXT, add_special_tokens=False).input_ids)
        run = Path("out/cells/eqft-none-2bit/run")
        model = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, run, subfolder="eqft_init")
        assert result()["rows"][2]["start"]["test.txt"] == pytest.approx(perplexity(model, tokens, 16), rel=1e-6)

    def test_calibration_goes_to_those_that_can_use_it(self, compare, undrawn):
        asked = ("--calibration", "test.txt", "--calibration-samples", 4, "--calibration-length", 16)
        code, _, err = compare(*STARTS, *asked, "--methods", "eqft,eqft:none,loftq,qera", "--quiet")
        assert (code, err) == (0, "")
        found = {row["method"]: row for row in result()["rows"]}
        starts = {name: json.loads(cells()[f"{name}-2bit/start.json"][0]) for name in ("eqft", "eqft-none", "loftq")}
        assert "test.txt" in starts["eqft"]["calibration"]["text"]
        assert starts["eqft-none"]["calibration"] is starts["loftq"]["calibration"] is None
        assert found["eqft"]["start"] != found["eqft:none"]["start"]

    def test_a_width_between_two_is_a_mix(self, compare, undrawn):
        few = ("--methods", "eqft", "--calibration", "random", "--calibration-samples", 4, "--calibration-length", 16)
        code, out, err = compare(*STARTS, *few, "--bits", "2,2.5,3,6", "--keep-runs")
        assert (code, err) == (0, "")
        _, two, half, three, six = result()["rows"]
        assert [row["bits"] for row in (two, half, three, six)] == [2, 2.5, 3, 6]
        assert three["start"]["test.txt"] != half["start"]["test.txt"] != two["start"]["test.txt"]
        assert two["bits_per_weight"] < half["bits_per_weight"] < three["bits_per_weight"] < six["bits_per_weight"]
        assert three["weight_error"] < half["weight_error"] < two["weight_error"]
        for name, widths in {"2.5": {2, 3}, "6": {4, 8}}.items():
            layers = json.loads(Path(f"out/cells/eqft-{name}bit/run/qinit.json").read_text())["layers"]
            assert {layer["bits"] for layer in layers} == widths
        assert ["2.5", "eqft"] in [line.split()[:2] for line in out.splitlines()]

    def test_a_rate_that_is_too_high_is_shown_and_not_chosen(self, compare, undrawn):
        code, out, _ = compare(
            *STARTS, *TUNING, "--learning-rates", "0.001,1e30", "--ceilings", "lora", "--finetune", 3
        )
        assert code == 0
        row = result()["rows"][0]
        assert row["rate"] == 0.001
        assert row["rates"][1]["diverged"] == "the loss was no finite number at step 2"
        assert row["rates"][1]["end"] is row["rates"][1]["validation"] is None
        assert "lora-16bit/rate1e+30-seed0: the loss was no finite number" in out

    def test_activations_computed_again_change_nothing(self, compare, undrawn):
        few = (*STARTS, *TUNING, "--ceilings", "lora", "--methods", "eqft:none", "--seeds", "0")
        assert compare(*few, "--quiet")[0] == 0
        kept = result()["rows"]
        assert compare(*few, "--quiet", "--gradient-checkpointing")[0] == 0
        for one, other in zip(kept, result()["rows"], strict=True):
            assert one["end"]["test.txt"]["mean"] == pytest.approx(other["end"]["test.txt"]["mean"], rel=1e-5)


class TestResuming:
    def test_nothing_is_done_twice(self, compare, compared):
        compared()
        before, first = cells(), result()
        code, out, _ = compare(*STARTS, *TUNING)
        assert code == 0
        assert cells() == before
        assert result() == first
        assert "16 of 16 cells are there from an earlier run" in out

    def test_after_an_interrupt_finished_cells_are_kept(self, compare, compared, monkeypatch):
        done = []
        work = measure.work

        def stopped(comparison, cell, progress):
            if len(done) == 7:
                raise KeyboardInterrupt
            done.append(cell)
            return work(comparison, cell, progress)

        with monkeypatch.context() as patch:
            patch.setattr(workers, "work", stopped)
            code, _, err = compare(*STARTS, *TUNING)
        assert code == 130
        assert err == "error: interrupted; finished cells are kept in out, and the same command goes on\n"
        before = cells()
        assert len(before) == 7
        assert compare(*STARTS, *TUNING)[0] == 0
        after = cells()
        assert {name: after[name] for name in before} == before
        assert len(after) == 16
        resumed = result()
        Path("out").rename("resumed")
        compared()
        assert result()["rows"] == resumed["rows"]

    def test_other_steps_keep_the_starts_and_other_text_keeps_nothing(self, compare, compared):
        compared("--ceilings", "lora")
        before = cells()
        compare(*STARTS, *TUNING, "--ceilings", "lora", "--finetune", 3)
        after = cells()
        same = {name for name in before if before[name] == after[name]}
        # The start of loftq is written again with its run, which had been removed; its figures are the old ones.
        assert "lora-16bit/start.json" in same
        assert not any("rate" in name for name in same)
        for name in ("loftq-2bit/start.json", "eqft-none-2bit/start.json"):
            one, other = (json.loads(found[name][0]) for found in (before, after))
            assert one["perplexities"] == other["perplexities"]
        Path("test.txt").write_text(TEXT + " " + words(4, 5, 6))
        compare(*STARTS, *TUNING, "--ceilings", "lora", "--finetune", 3)
        assert not {name for name, value in after.items() if cells()[name] == value}

    def test_another_learning_rate_is_added(self, compare, compared):
        compared("--ceilings", "lora")
        before = cells()
        compare(*STARTS, *TUNING, "--ceilings", "lora", "--methods", "loftq", "--learning-rates", "0.001,0.003,0.01")
        after = cells()
        assert {name for name in before if "rate" in name and before[name] == after[name]} >= {
            *("lora-16bit/rate0.001-seed0.json", "loftq-2bit/rate0.01-seed0.json")
        }
        assert "loftq-2bit/rate0.003-seed0.json" in after

    def test_a_damaged_cell_is_made_anew(self, compare, undrawn):
        compare(*STARTS)
        first = result()
        Path("out/cells/loftq-2bit/start.json").write_text('{"signature": ')
        assert compare(*STARTS)[0] == 0
        assert result()["rows"] == first["rows"]

    def test_a_dry_run_says_what_is_left_and_writes_nothing(self, compare, compared):
        code, out, err = compare(*STARTS, *TUNING, "--dry-run")
        assert (code, err) == (0, "")
        assert not Path("out").exists()
        assert "left  eqft-none-2bit/rate0.001-seed0" in out
        assert "16 of 16 cells are left: about " in out
        compared("--ceilings", "lora")
        before = cells()
        code, out, _ = compare(*STARTS, *TUNING, "--dry-run", "--json")
        found = json.loads(out)
        assert {one["cell"]: one["done"] for one in found["cells"]}["full-16bit/start"] is False
        assert (len(found["cells"]), found["left"], cells()) == (16, 4, before)
        assert found["seconds"] > found["seconds_per_step"] > 0
        assert "nothing left to do" in compare(*STARTS, *TUNING, "--dry-run", "--ceilings", "lora")[1]


class TestWorkers:
    def test_two_processes_find_what_one_finds(self, compare, undrawn, forks, strong_reader):
        few = (*STARTS, *TUNING, "--ceilings", "lora", "--methods", "eqft:none", "--learning-rates", 0.01)
        code, out = forks.call(in_workers, str(Path.cwd()), ["compare", str(strong_reader), *map(str, few)])
        assert code == 0
        found = result()
        assert compare(*few, "--overwrite", "--quiet")[0] == 0
        for one, other in zip(found["rows"], result()["rows"], strict=True):
            assert one["start"]["test.txt"] == pytest.approx(other["start"]["test.txt"], rel=1e-5)
            assert one["end"]["test.txt"]["mean"] == pytest.approx(other["end"]["test.txt"]["mean"], rel=1e-4)
        assert "6/6 " in out

    def test_a_killed_worker_is_one_line(self, compare, undrawn, monkeypatch):
        monkeypatch.setattr("qinit_cli.compare.hush", _Dying())
        code, _, err = compare(*STARTS, "--jobs", 2)
        assert code == 2
        assert "its worker process was killed, for want of memory perhaps; run again with fewer --jobs" in err


def in_workers(place, arguments):
    """Run a comparison in this process, whose two workers are forks of it; return the exit code and stdout."""
    os.chdir(place)
    sys.modules.update(dict.fromkeys(("matplotlib.figure", "plotly.graph_objects")))
    forking = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda _: forking
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = run_command([*arguments, "--jobs", "2"])
    return code, out.getvalue()


class _Dying:
    """Does nothing here, and ends the process that it is sent to."""

    def __call__(self):
        pass

    def __reduce__(self):
        return functools.partial, (os._exit, 1)


class TestFailures:
    def test_a_failed_cell_says_why_and_stops_no_other(self, compare, undrawn, monkeypatch):
        run = measure.run

        def fail(plan, directory, **options):
            if plan.recipe.method == "loftq":
                raise torch.OutOfMemoryError("no room for\nthis")
            return run(plan, directory, **options)

        with monkeypatch.context() as patch:
            patch.setattr(measure, "run", fail)
            code, out, err = compare(*STARTS, *TUNING, "--ceilings", "lora")
        assert (code, err) == (1, "")
        assert "failed: loftq, 2 bits: OutOfMemoryError: no room for this; give a shorter --length, or --" in out
        lora, loftq, eqft = result()["rows"]
        assert loftq["failed"] == ["OutOfMemoryError: no room for this; give a shorter --length, or --device cpu"]
        assert (loftq["start"], loftq["end"]) == (None, None)
        assert lora["end"]
        assert eqft["end"]
        before = cells()
        assert compare(*STARTS, *TUNING, "--ceilings", "lora")[0] == 0
        assert result()["rows"][1]["end"]
        assert {name: cells()[name] for name in before} == before

    def test_a_full_disk_is_one_line_and_finished_cells_are_kept(self, compare, undrawn, monkeypatch):
        replace = Path.replace

        def full(path, target):
            if str(target).endswith("loftq-2bit/start.json"):
                raise OSError(28, "No space left on device")
            return replace(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", full)
            code, _, err = compare(*STARTS)
        assert code == 2
        assert err == (
            "error: out/cells/loftq-2bit/start.json: cannot be written (No space left on device); "
            "finished cells are kept\n"
        )
        assert list(cells()) == ["full-16bit/start.json"]
