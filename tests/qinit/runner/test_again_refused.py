"""What a polish of a finished run refuses, and what it leaves where it is."""

import shutil
from pathlib import Path

import pytest

from qinit.errors import CheckpointError, OutputError, RecipeError, ReportError
from qinit.events import Finished
from qinit.files.manifest import refresh
from qinit.runner import again
from tests.helpers import contents, edit_json, edit_tensors, names
from tests.models import make_checkpoint
from tests.qinit.runner.polishing import SHORT, polished


class TestRefusals:
    def test_another_model(self, ready, tmp_path, strong_llama, place):
        run = ready()
        before = contents(run)
        wide = make_checkpoint(tmp_path / "wide", hidden_size=128)
        with pytest.raises(CheckpointError, match=r"wide: is not the model that .*out was made from: bytes of weights"):
            polished(run, model=str(wide))
        other = shutil.copytree(strong_llama, tmp_path / "embedded")
        edit_tensors(other / "model.safetensors", lambda tensors: tensors["model.norm.weight"].mul_(2))
        with pytest.raises(CheckpointError, match=r"tensor 'model\.norm\.weight' has other values; give that one with"):
            polished(run, model=str(other))
        other = shutil.copytree(strong_llama, tmp_path / "tuned")
        name = "model.layers.1.mlp.up_proj.weight"
        edit_tensors(other / "model.safetensors", lambda tensors: tensors[name].mul_(1.01))
        with pytest.raises(CheckpointError, match=r"up_proj: expected the errors 0\.\d+ and 0\.\d+, found 0\.\d+ and"):
            polished(run, model=str(other))
        assert contents(run) == before
        assert names(place) == ["out"]

    def test_a_model_that_was_moved(self, ready, strong_llama, tmp_path):
        run = ready()
        edit_json(run / "qinit.json", lambda raw: raw["source"].update(model=str(tmp_path / "gone")))
        refresh(run, ["qinit.json"])
        with pytest.raises(CheckpointError, match="gone: no such directory") as caught:
            polished(run)
        assert caught.value.__notes__ == [f"{run} was made from it: say where it is now with --model"]
        (run / "README.md").unlink()
        report = polished(run, model=str(strong_llama)).report
        assert report.source["model"] == str(tmp_path / "gone")

    def test_the_embedded_demo_model_is_not_looked_for_here(self, ready, place, monkeypatch, strong_llama):
        run = ready()
        edit_json(
            run / "qinit.json", lambda raw: (raw["source"].update(model="demo"), raw["recipe"].update(model=None))
        )
        refresh(run, ["qinit.json"])
        monkeypatch.setattr(again, "demo_directory", lambda: strong_llama)
        monkeypatch.chdir(place)
        run.rename("demo")
        assert again.plan_polish(Path("demo"), **SHORT).plan.checkpoint.directory == strong_llama
        Path("demo").rename("run")
        assert again.plan_polish(Path("run"), model="demo", **SHORT).plan.checkpoint.directory == strong_llama
        edit_json(Path("run/qinit.json"), lambda raw: raw["source"].update(model="run"))
        refresh(Path("run"), ["qinit.json"])
        with pytest.raises(CheckpointError, match="already quantized") as caught:
            again.plan_polish(Path("run"), **SHORT)
        assert caught.value.__notes__ == ["run was made from it: say where it is now with --model"]

    def test_a_report_that_says_of_an_earlier_polish_what_qinit_does_not_write(self, ready):
        run = ready()
        edit_json(run / "qinit.json", lambda raw: raw["totals"]["calibration"].update(polish={"steps": 3}))
        refresh(run, ["qinit.json"])
        with pytest.raises(ReportError, match=r"totals\.calibration\.polish is not what qinit writes \(KeyError"):
            polished(run)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"steps": 0}, "steps: expected at least 1, found 0"),
            ({"calibration": "none"}, "a polish needs text .*, found none"),
            ({"calibration_samples": 0}, "calibration_samples: .*found 0"),
            ({"text_field": "body"}, "text_field: there is no field to name in calibration random"),
        ],
    )
    def test_options(self, ready, options, match):
        with pytest.raises(RecipeError, match=match):
            polished(ready(), **options)

    def test_places(self, ready, place):
        run = ready()
        for out in (run / "below", place):
            with pytest.raises(OutputError, match="holds or lies in the run"):
                polished(run, out)
        quantized = shutil.copytree(run, place / "other")
        with pytest.raises(OutputError, match="exists; pass --overwrite"):
            polished(run, quantized)
        assert isinstance(polished(run, quantized, overwrite=True), Finished)


def test_the_users_files_stay_where_they_are(ready, place):
    run = ready()
    (run / "checkpoint-10").mkdir()
    (run / "checkpoint-10/adapter_model.safetensors").write_text("mine")
    before = contents(run)
    with pytest.raises(OutputError, match=r"replaced: checkpoint-10/adapter_model\.safetensors; move it elsewhere, or"):
        polished(run)
    assert names(place) == ["out"]
    assert isinstance(polished(run, place / "other"), Finished)
    assert contents(run) == before
    assert not (place / "other/checkpoint-10").exists()


def test_a_card_that_was_moved_away_is_written_and_old_pictures_are_not_taken_over(ready):
    run = ready()
    (run / "README.md").unlink()
    (run / "report.png").touch()
    assert isinstance(polished(run), Finished)
    assert (run / "README.md").is_file()
    assert not (run / "report.png").exists()
