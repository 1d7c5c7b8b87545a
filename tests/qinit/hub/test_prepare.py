"""An adapter alone, made ready for the Hub; runs, merges and trained adapters are in the files beside this one."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from qinit.errors import HubError, ReportError
from qinit.files.manifest import MANIFEST_NAME
from qinit.hub.prepare import prepare
from qinit.hub.push import _staged as staged
from tests.helpers import contents, repair
from tests.stock import logits

REPO, BASE = "me/tiny-lora", "meta/tiny"


@pytest.fixture(scope="module")
def made(llama, tmp_path_factory):
    """A start that leaves its base as it is."""
    place = tmp_path_factory.mktemp("alone") / "adapter"
    repair(llama, llama, place, method="lora")
    return place


@pytest.fixture
def alone(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "alone"))


def trained_from(alone, to):
    shutil.copytree(alone, to, ignore=shutil.ignore_patterns("qinit.json", "README.md", MANIFEST_NAME))
    (to / "optimizer.pt").write_text("secret")
    return to


@pytest.mark.parametrize("base", [None, BASE])
def test_no_place_on_this_machine_is_pushed_and_the_base_is_named_where_it_is_known(alone, llama, base):
    before = contents(alone)
    prepared = prepare(alone, REPO, base=base)
    assert contents(alone) == before
    assert prepared.files.keys() == before.keys()
    assert prepared.rewritten.keys() == before.keys() - {"adapter_model.safetensors"}
    for name, content in prepared.rewritten.items():
        assert str(llama.parent) not in content.decode(), name
        assert str(alone.parent) not in content.decode(), name
    assert json.loads(prepared.rewritten["adapter_config.json"])["base_model_name_or_path"] == base
    card = prepared.rewritten["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front.get("base_model"), front.get("base_model_relation")) == (base, "adapter" if base else None)
    assert "\n".join(prepared.snippet()) == re.search(r"```python\n(.*?)\n```", card, re.DOTALL)[1]
    assert f"by qinit for `{base or 'llama'}`" in card
    assert [str(llama) in note for note in prepared.notes] == ([] if base else [True])


def test_an_adapter_that_was_trained_from_it_takes_its_place(alone, llama, tmp_path):
    trained = trained_from(alone, tmp_path / "trained")
    prepared, names = prepare(alone, REPO, trained, BASE), {}
    card = prepared.rewritten["README.md"].decode()
    assert ("The adapter was trained" in card, "before it is trained" in card) == (True, False)
    assert prepared.left_out == (str(trained / "optimizer.pt"),)
    assert prepared.snippet("v2")[-1] == f'model = PeftModel.from_pretrained(base, "{REPO}", revision="v2")'
    with staged(prepared) as folder:
        lines = "\n".join(prepared.snippet()).replace(json.dumps(REPO), json.dumps(str(folder)))
        exec(lines.replace(json.dumps(BASE), json.dumps(str(llama))), names)
    assert logits(names["model"]).isfinite().all()


def test_what_does_not_fit_is_refused(alone, finished):
    with pytest.raises(HubError, match="names no owner"):
        prepare(alone, REPO, base="tiny")
    with pytest.raises(ReportError, match="--base: is about an adapter alone"):
        prepare(finished, REPO, base=BASE)
    (alone / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ReportError, match=f"is not what the run wrote .* push it with --adapter {alone}$"):
        prepare(alone, REPO)
