import pytest

from qinit.errors import OutputError, RecipeError
from qinit.trainers.write import config_for, trainer_named, write_config


def test_an_unknown_trainer_is_answered_with_the_closest(finished, tmp_path):
    with pytest.raises(RecipeError, match=r"no 'axolotle' \(did you mean 'axolotl'\?\); known are transformers, trl"):
        config_for(finished, "axolotle", str(tmp_path / "train.jsonl"))


def test_a_trainer_that_cannot_take_the_run_says_why_and_what_would_work(finished, tmp_path):
    with pytest.raises(RecipeError, match=r"--trainer torchtune: its recipes make a new adapter.*use --trainer trl"):
        config_for(finished, "torchtune", str(tmp_path / "train.jsonl"))


def test_what_is_written_names_run_data_and_start(finished, tmp_path):
    text = config_for(finished, "llama-factory", str(tmp_path / "my texts.jsonl")).text
    assert f"\nmodel_name_or_path: {finished}\nadapter_name_or_path: {finished}/eqft_init\n" in text
    assert f'\ndataset: "my texts"\ndataset_dir: {tmp_path}\n' in text
    assert trainer_named("llama-factory").command == "llamafactory-cli train {file}"


@pytest.mark.parametrize("name", ["a\nimport evil", "\udcff.jsonl"])
def test_a_path_that_would_break_out_of_a_comment_is_refused(finished, tmp_path, name):
    with pytest.raises(RecipeError, match="cannot be written; rename it"):
        config_for(finished, "trl", str(tmp_path / name))


def test_a_file_that_is_there_is_kept(tmp_path):
    write_config("a", tmp_path / "file")
    with pytest.raises(OutputError, match="exists; choose another file"):
        write_config("b", tmp_path / "file")
    with pytest.raises(OutputError, match="cannot be written"):
        write_config("b", tmp_path / "none" / "file")
    assert (tmp_path / "file").read_text() == "a"
