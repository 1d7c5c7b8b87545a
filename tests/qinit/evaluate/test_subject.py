import json
import shutil

import pytest

from qinit.errors import CheckpointError
from qinit.evaluate.subject import Subject, find_model, find_subject, repair_base
from qinit.files.manifest import file_sum, read_manifest, write_manifest
from qinit.merge.plan import plan_merge
from qinit.merge.run import merge
from qinit.source.demo import demo_directory
from tests.evaluated import make_run
from tests.models import make_checkpoint


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    return make_run(source, tmp_path_factory.mktemp("made") / "run", format="dense")


@pytest.fixture
def run(made, tmp_path):
    """A run that was moved: its adapter names a place where there is nothing now."""
    directory = shutil.copytree(made, tmp_path / "run")
    names(directory / "eqft_init", str(tmp_path / "before"))
    return directory


def names(adapter, base):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base}))


def named(adapter):
    return json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]


def lone(run, tmp_path, base):
    """A copy of the adapter, outside of the run, that names `base`."""
    adapter = shutil.copytree(run / "eqft_init", tmp_path / "elsewhere" / "adapter")
    names(adapter, str(base))
    return adapter


class TestFound:
    def test_a_run_is_its_base_and_its_adapter(self, made):
        found = find_subject(str(made), None, None)
        assert found == Subject(str(made), made, made / "eqft_init")
        assert found.run == made

    def test_a_checkpoint_is_itself_and_gets_nothing_written(self, tiny_llama):
        found = find_subject(str(tiny_llama), None, None)
        assert (found.base, found.adapter, found.run) == (tiny_llama, None, None)

    def test_a_base_is_without_the_adapter_of_its_run(self, made):
        found = find_subject(None, str(made), None)
        assert (found.base, found.adapter, found.run) == (made, None, None)

    def test_another_adapter_on_a_run_is_not_that_run(self, made, tmp_path):
        adapter = lone(made, tmp_path, made)
        for found in (find_subject(None, str(made), adapter), find_subject(None, None, adapter)):
            assert (found.base, found.adapter, found.run) == (made, adapter, None)

    def test_the_run_s_own_adapter_is_that_run_however_it_is_given(self, made):
        adapter = made / "eqft_init"
        for found in (
            find_subject(None, str(made), adapter),
            find_subject(None, None, adapter),
            find_subject(str(adapter), None, None),
        ):
            assert found.run.resolve() == made.resolve()
            assert found.lost is None

    def test_the_demo_model_has_a_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert find_model("demo") == demo_directory()
        (tmp_path / "demo").mkdir()
        assert str(find_model("demo")) == "demo"  # what is there comes first

    def test_an_adapter_on_a_base_from_the_hub(self, made, tmp_path, hub):
        hub.repos["someone/base"] = make_checkpoint(tmp_path / "base")
        found = find_subject(None, None, lone(made, tmp_path, "someone/base"))
        assert (found.base / "config.json").read_bytes() == (tmp_path / "base/config.json").read_bytes()


class TestMoved:
    def test_the_run_that_the_adapter_lies_in_is_taken(self, run, tmp_path):
        for found in (find_subject(None, None, run / "eqft_init"), find_subject(str(run), None, None)):
            assert found.base.resolve() == run.resolve()
            assert found.run is not None
            assert found.lost == str(tmp_path / "before")

    def test_also_for_another_adapter_in_it(self, run):
        (run / "eqft_init").rename(run / "checkpoint-100")
        found = find_subject(None, None, run / "checkpoint-100")
        assert found.base.resolve() == run.resolve()
        assert found.run is None

    def test_and_for_a_copy_whose_original_is_still_there(self, run, made):
        names(run / "eqft_init", str(made))
        found = find_subject(None, None, run / "eqft_init")
        assert found.base.resolve() == run.resolve()
        assert found.lost is None

    def test_the_repair_names_the_base_and_keeps_all_else(self, run):
        write_manifest(run)
        before = json.loads((run / "eqft_init/adapter_config.json").read_text())
        repair_base(find_subject(None, None, run / "eqft_init"))
        after = json.loads((run / "eqft_init/adapter_config.json").read_text())
        assert after == {**before, "base_model_name_or_path": str(run.resolve())}
        assert read_manifest(run)["eqft_init/adapter_config.json"] == file_sum(run / "eqft_init/adapter_config.json")
        assert find_subject(None, None, run / "eqft_init").lost is None
        assert not list(run.rglob("*.tmp"))

    def test_what_is_in_order_is_not_touched(self, made):
        before = (made / "eqft_init/adapter_config.json").stat().st_mtime_ns
        repair_base(find_subject(str(made), None, None))
        assert (made / "eqft_init/adapter_config.json").stat().st_mtime_ns == before

    @pytest.mark.parametrize("base", ["/gone/run", "someone/gone"])
    def test_without_a_run_around_it_the_error_names_the_base_and_the_option(self, run, tmp_path, base):
        adapter = lone(run, tmp_path, base)
        with pytest.raises(CheckpointError, match=rf"names the base '{base}', which is not there.* with --base$"):
            find_subject(None, None, adapter)
        assert find_subject(None, str(run), adapter).base == run

    def test_an_adapter_that_names_none(self, run, tmp_path):
        with pytest.raises(CheckpointError, match=r"names no base under base_model_name_or_path; .* --base$"):
            find_subject(None, None, lone(run, tmp_path, ""))


class TestMissing:
    def test_the_run_s_adapter(self, run):
        shutil.rmtree(run / "eqft_init")
        with pytest.raises(CheckpointError, match=r"eqft_init: not found, so the run has no adapter .*`--base .*/run`"):
            find_subject(str(run), None, None)
        assert find_subject(None, str(run), None).adapter is None

    @pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
    def test_a_part_of_it(self, run, name):
        (run / "eqft_init" / name).unlink()
        for arguments in ((str(run), None, None), (None, str(run), run / "eqft_init")):
            with pytest.raises(CheckpointError, match=rf"eqft_init/{name}: not found"):
                find_subject(*arguments)

    @pytest.mark.parametrize("arguments", [(None, None, None), ("a", "b", None)])
    def test_too_little_and_too_much(self, arguments):
        with pytest.raises(CheckpointError, match="one of the two"):
            find_subject(*arguments)

    def test_the_directory(self, tmp_path):
        with pytest.raises(CheckpointError, match="no such directory"):
            find_subject(str(tmp_path / "gone"), None, None)


def test_a_merge_is_a_checkpoint_without_an_adapter(finished, tmp_path):
    list(merge(plan_merge(finished), tmp_path / "out"))
    assert find_subject(str(tmp_path / "out"), None, None) == Subject(str(tmp_path / "out"), tmp_path / "out")
