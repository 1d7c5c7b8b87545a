"""What a finished run must be to be polished further, and what would be lost if it were replaced."""

import re

import pytest

from qinit.errors import CheckpointError, OutputError, ReportError
from qinit.files.manifest import refresh, write_manifest
from qinit.planner.again import plan_again, polish_recipe, recipe_of
from qinit.runner.before import Before
from tests.helpers import contents, edit_json, edit_tensors, quantize


@pytest.fixture
def run(tiny_llama, place):
    quantize(tiny_llama, place / "run")
    return place / "run"


def opened(run):
    before = Before.open(run)
    recipe = recipe_of(before.report, run)
    return before, plan_again(
        before.report, polish_recipe(recipe, calibration="random"), run, run.parent.parent / "tiny-llama"
    )


class TestWholeness:
    def test_a_run_as_it_was_made(self, run):
        before, plan = opened(run)
        assert len(before.tensors(plan)) == len(before.base) + 28
        before.require_unchanged()
        before.require_replaceable(plan)
        assert before.identity == (run / "SHA256SUMS").read_text()

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json", "qinit.json"])
    def test_damage_names_the_file(self, run, name):
        raw = bytearray((run / name).read_bytes())
        if name == "model.safetensors":
            raw[-3] ^= 1
        (run / name).write_bytes(bytes(raw) + (b"" if name == "model.safetensors" else b"\n"))
        with pytest.raises(ReportError, match=rf"{re.escape(name)}: is not what the run wrote .*make the run again"):
            Before.open(run)

    @pytest.mark.parametrize("name", ["model.safetensors", "eqft_init/adapter_config.json"])
    def test_so_does_what_is_missing(self, run, name):
        (run / name).unlink()
        with pytest.raises(ReportError, match=rf"{re.escape(name)}: is missing"):
            Before.open(run)

    def test_without_a_list_of_sums_nothing_is_believed(self, run):
        (run / "SHA256SUMS").unlink()
        with pytest.raises(ReportError, match="SHA256SUMS: cannot be read"):
            Before.open(run)

    def test_the_list_must_have_what_matters(self, run):
        config = (run / "config.json").read_bytes()
        (run / "config.json").unlink()
        write_manifest(run)
        (run / "config.json").write_bytes(config)
        with pytest.raises(ReportError, match=r"SHA256SUMS: does not list config\.json; make the run again"):
            Before.open(run)

    @pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
    def test_an_adapter_that_was_trained(self, run, name):
        file = run / "eqft_init" / name
        if name.endswith("json"):
            edit_json(file, lambda config: config.update(lora_dropout=0.1))
        else:
            edit_tensors(file, lambda tensors: next(iter(tensors.values())).add_(1))
        with pytest.raises(
            ReportError, match=rf"{re.escape(name)}: was changed since .*needed is the start that the run wrote"
        ):
            Before.open(run)

    def test_tensors_that_are_not_those_of_the_plan(self, run):
        name = "model.layers.0.mlp.up_proj.scales"
        edit_tensors(run / "model.safetensors", lambda tensors: tensors.update({name: tensors[name].float()}))
        refresh(run, ["model.safetensors"])
        before, plan = opened(run)
        with pytest.raises(
            ReportError, match=rf"tensor '{re.escape(name)}': expected float16 \[\d+, \d+\], found float32"
        ):
            before.tensors(plan)

    def test_what_cannot_be_opened_as_a_model(self, run):
        (run / "model.safetensors").write_bytes(b"x")
        refresh(run, ["model.safetensors"])
        before, plan = opened(run)
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            before.tensors(plan)


class TestWhatWouldBeLost:
    @pytest.mark.parametrize(
        "name", ["notes.txt", "checkpoint-10/adapter_model.safetensors", ".git/HEAD", "eqft_init/x"]
    )
    def test_files_are_named(self, run, name):
        before, plan = opened(run)
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("mine")
        kept = contents(run)
        with pytest.raises(
            OutputError, match=rf"would be lost when it is replaced: {re.escape(name)}; move it elsewhere"
        ):
            before.require_replaceable(plan)
        assert contents(run) == kept

    def test_many_are_counted_links_too(self, run):
        before, plan = opened(run)
        for number in range(7):
            (run / f"{number}.txt").touch()
        (run / "link").symlink_to(run.parent)
        with pytest.raises(OutputError, match=r"replaced: 0\.txt, 1\.txt, 2\.txt, 3\.txt, 4\.txt and 3 more; move"):
            before.require_replaceable(plan)

    def test_an_edited_card(self, run):
        card = run / "README.md"
        card.write_text(card.read_text() + "my words\n")
        for _ in range(2):
            before, plan = opened(run)
            with pytest.raises(OutputError, match=r"README\.md: is not the card that qinit writes for this run"):
                before.require_replaceable(plan)
            refresh(run, ["README.md"])  # as an evaluation does
        card.unlink()
        before.require_replaceable(plan)

    def test_a_report_that_makes_no_card(self, run):
        edit_json(run / "qinit.json", lambda raw: raw["totals"].update(check={"kl": "much"}))
        refresh(run, ["qinit.json"])
        before, plan = opened(run)
        with pytest.raises(OutputError, match="is not the card that qinit writes"):
            before.require_replaceable(plan)

    def test_pictures_are_no_loss(self, run):
        before, plan = opened(run)
        (run / "report.png").touch()
        (run / "report.html").touch()
        before.require_replaceable(plan)


class TestMeanwhile:
    def test_another_run_in_its_place(self, run):
        before, _ = opened(run)
        edit_json(run / "qinit.json", lambda raw: raw.update(notes=["evaluated"]))
        refresh(run, ["qinit.json"])
        with pytest.raises(OutputError, match="was changed since it was opened; start again"):
            before.require_listed()

    def test_a_training_that_ended_in_it(self, run):
        before, _ = opened(run)
        edit_tensors(run / "eqft_init/adapter_model.safetensors", lambda tensors: next(iter(tensors.values())).add_(1))
        before.require_listed()
        with pytest.raises(OutputError, match=r"the adapter was trained .*that was while it was polished"):
            before.require_unchanged()


def test_what_is_copied_along_is_what_no_polish_writes(run, place):
    (run / "deep").mkdir()
    for name in ("sensitivity.json", "deep/tokenizer.json", "report.png"):
        (run / name).write_text("{}")
    write_manifest(run)
    (place / "to").mkdir()
    Before.open(run).copy_others(place / "to")
    assert set(contents(place / "to")) == {"sensitivity.json", "deep/tokenizer.json", "generation_config.json"}
