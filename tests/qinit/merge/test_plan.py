import shutil

import pytest

from qinit.errors import RecipeError, ReportError
from qinit.exports import FinishedRun
from qinit.merge.plan import plan_merge
from tests.broken_off import PLAIN, break_off


def test_options_that_there_are_not(finished):
    with pytest.raises(RecipeError, match=r"--dtype: no 'bfloat' \(did you mean 'bfloat16'\?\); known are float32"):
        plan_merge(finished, dtype="bfloat")
    with pytest.raises(RecipeError, match="--max-shard-size: expected a size like 5GB"):
        plan_merge(finished, max_shard_size="five")


def test_what_is_no_finished_run(llama, tmp_path):
    with pytest.raises(ReportError, match="no such directory; pass the directory that"):
        plan_merge(tmp_path / "gone")
    break_off(llama, tmp_path / "out", 3, **PLAIN)
    for opened in (plan_merge, FinishedRun.open):  # to merge it, and to export it
        with pytest.raises(ReportError, match=r"out: an unfinished run \(3 of 14 layers are kept, .*\); finish it fi"):
            opened(tmp_path / "out")


def test_identity_changes_with_the_run_and_with_the_adapter(finished, tmp_path):
    first = plan_merge(finished)
    assert first.own
    other = shutil.copytree(finished / "eqft_init", tmp_path / "adapter")
    assert plan_merge(finished, other).identity() == first.identity()
    copy = shutil.copytree(finished, tmp_path / "run")
    (copy / "SHA256SUMS").unlink()
    found = plan_merge(copy)
    assert found.identity()["run"] != first.identity()["run"]
    assert found.identity()["adapter"] == first.identity()["adapter"]
    assert not plan_merge(finished, other).own
