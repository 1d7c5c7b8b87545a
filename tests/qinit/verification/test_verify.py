import random
import shutil

import pytest

from qinit.errors import CheckpointError, QinitError
from qinit.files.manifest import MANIFEST_NAME, listed
from qinit.files.tensors import read_header, write_header_only
from qinit.verification.findings import Finding
from qinit.verification.verify import verify
from tests.helpers import quantize
from tests.models import make_checkpoint
from tests.qinit.verification.runs import problems, vouched
from tests.qinit.verification.test_values import BASE


def test_a_source_that_cannot_be_read_is_an_error(copy_of, tmp_path):
    source, run = copy_of("gptq")
    with pytest.raises(CheckpointError, match="no such directory"):
        vouched(run, tmp_path / "gone")
    source_copy = shutil.copytree(source, tmp_path / "source")
    header = read_header(source_copy / BASE)
    entries = {n: {"dtype": "BF16", "shape": t.shape, "data_offsets": [0, 0]} for n, t in header.items()}
    end = 0
    for name, tensor in header.items():
        entries[name]["data_offsets"] = [end, end := end + tensor.nbytes]
    write_header_only(source_copy / BASE, entries)
    with pytest.raises(CheckpointError, match=rf"{source_copy / BASE}: ends inside tensor"):
        vouched(run, source_copy)


def test_a_run_of_every_kind_is_sound(each_run):
    source, run = each_run
    assert [str(each) for each in verify(run, source) if isinstance(each, Finding)] == []


@pytest.mark.parametrize(
    ("model_class", "options"),
    [
        ("LlamaForSequenceClassification", {"format": "gptq", "target_modules": "q_proj,down_proj"}),
        ("LlamaForCausalLM", {"format": "dense", "method": "qlora"}),  # no low rank
        ("LlamaForCausalLM", {"format": "dense", "method": "loftq", "exclude": r"model\.layers\.0\..*"}),
        ("LlamaForCausalLM", {"format": "gptq", "ratio": 0.3, "allocation": "first", "max_shard_size": "60KB"}),
    ],
)
def test_runs_over_a_part_and_with_other_methods_are_sound_too(model_class, options, tmp_path):
    source = make_checkpoint(tmp_path / "source", dtype="float32", model_class=model_class, num_labels=2)
    quantize(source, tmp_path / "run", group_size=32, **options)
    assert vouched(tmp_path / "run", source) == []


@pytest.mark.parametrize("kind", ["gptq", "dense", "kept"])
def test_flipped_bits_without_a_list_end_in_findings_or_in_nothing_but_never_in_a_crash(kind, copy_of):
    source, run = copy_of(kind)
    (run / MANIFEST_NAME).unlink()
    rng, found_some = random.Random(kind), 0
    for name in [name for name in listed(run) if name.endswith((".json", ".safetensors"))]:
        sound = (run / name).read_bytes()
        for place in [0, *(rng.randrange(min(len(sound), 3000)) for _ in range(4))]:
            damaged = bytearray(sound)
            damaged[place] ^= 1 << rng.randrange(8)
            (run / name).write_bytes(damaged)
            found_some += bool(problems(run, source))
        (run / name).write_bytes(sound)
    assert found_some > 10
    assert not problems(run, source)


@pytest.mark.parametrize("name", ["gone", "empty"])
def test_a_directory_that_is_no_run_is_an_error(name, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(QinitError, match="pass the directory that `qinit eqft` wrote"):
        list(verify(tmp_path / name))
