import yaml

from qinit.report.exported import download_lines, hub_export_card, write_export_card
from qinit.report.report import Exported
from tests.qinit.report.reports import report

TOTALS = {"nominal_bits": 2, "layers": 3, "layers_kept": 1, "error_start": 0.5, "error": 0.25}


def test_the_card_of_an_export(tmp_path):
    from dataclasses import replace

    told = replace(report(**TOTALS), export=Exported("theirs", "their reader", trained=True, lost="digits"))
    write_export_card(tmp_path, told, {"license": "mit"}, library="lib", tags=["x"], load="`run it`")
    card = (tmp_path / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["library_name"], front["license"]) == ("lib", "mit")
    assert {"qinit", "eqft", "2-bit", "theirs", "x"} <= set(front["tags"])
    for text in (
        "as their reader reads them",
        "does not hold all of the run: digits.",
        "before the training",
        "`run it`",
    ):
        assert text in card
    on_hub = hub_export_card(card.replace("org/model", "/some/where"), "me/it")
    assert "```\nhf download me/it --local-dir it && cd it\n```\n`run it`" in on_hub
    assert "base_model" not in yaml.safe_load(on_hub.split("---\n")[1])
    assert download_lines("me/it", "a b") == ["hf download me/it --revision 'a b' --local-dir it && cd it"]
