import pytest

from qinit.errors import QinitError
from tests.qinit.snndlft import tiny

pytestmark = pytest.mark.usefixtures("snn")


def test_a_peft_that_knows_nothing_of_spikes_refuses_the_adapter(tmp_path, monkeypatch):
    from peft import PeftModel, mapping

    from qinit.recipe_files import SPIKING

    tiny.adapted(tiny.config()).save_pretrained(tmp_path)
    monkeypatch.delitem(mapping.PEFT_TYPE_TO_CONFIG_MAPPING, SPIKING)
    with pytest.raises(KeyError, match="SNN_DLFT"):
        PeftModel.from_pretrained(tiny.base(), tmp_path)


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_with_the_reason(merge):
    model = tiny.adapted(tiny.config())
    before = tiny.logits(model)
    with pytest.raises(QinitError, match="no matrix added to the base's weight computes the same"):
        getattr(model, merge)()
    assert tiny.logits(model).equal(before)
