import ast
import warnings

import pytest
import yaml

from qinit.files.tensors import read_header
from qinit.report.card import calibration_words, hub_card, load_snippet, polish_words, snippet_of
from qinit.report.report import Report
from tests.helpers import quantize
from tests.models import make_checkpoint


def front_matter(directory):
    _, front, body = (directory / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_has_front_matter_figures_recipe_and_how_to_load(tiny_llama, tmp_path):
    report = quantize(tiny_llama, tmp_path / "out", bits=3)
    front, body = front_matter(tmp_path / "out")
    assert front["base_model"] == str(tiny_llama)
    assert front["library_name"] == "peft"
    assert {"qinit", "eqft", "lora", "3-bit", "gptq"} <= set(front["tags"])
    assert f"{report.totals['bits_per_weight']:.3f}" in body
    assert f"{report.totals['error']:.4f}" in body
    assert 'from_pretrained(base, ".", subfolder="eqft_init", is_trainable=True)' in body
    assert "pip install gptqmodel optimum" in body
    recipe = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert recipe == report.recipe


def test_licence_and_language_come_from_the_sources_card(tiny_llama, tmp_path):
    (tiny_llama / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\ntags: [theirs]\n---\n# Theirs\n")
    quantize(tiny_llama, tmp_path / "out")
    front, body = front_matter(tmp_path / "out")
    assert (front["license"], front["language"]) == ("mit", ["en"])
    assert "theirs" not in front["tags"]
    assert "Theirs" not in body


def test_a_dense_base_needs_no_other_package(tiny_llama, tmp_path):
    quantize(tiny_llama, tmp_path / "out", format="dense")
    assert "gptqmodel" not in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("kept", "said"), [(True, "30 steps, held-out loss 0.5000 -> 0.2500"), (False, "30 steps, not")]
)
def test_the_polish_is_said_in_words(kept, said):
    result = {"steps": 30, "held_out_before": 0.5, "held_out_after": 0.25, "kept": kept}
    assert polish_words(result).startswith(said)


def test_one_polish_after_the_other_is_said_with_its_text():
    first = {"steps": 3, "text": "a", "held_out_before": 0.75, "held_out_after": 0.5, "kept": True}
    last = {"steps": 30, "text": "b", "held_out_before": 0.5, "held_out_after": 0.25, "kept": True}
    assert polish_words({**last, "earlier": [first]}) == (
        "3 steps on a, held-out loss 0.7500 -> 0.5000; then 30 steps on b, held-out loss 0.5000 -> 0.2500"
    )
    assert polish_words({**last, "earlier": []}) == "30 steps on b, held-out loss 0.5000 -> 0.2500"
    assert calibration_words({"polish": last}) == {"polish": "30 steps, held-out loss 0.5000 -> 0.2500"}


def test_a_calibrated_card_says_on_what_and_how_close_the_outputs_are(tiny_llama, tmp_path):
    few = {"calibration": "random", "calibration_samples": 4, "calibration_length": 16}
    report = quantize(tiny_llama, tmp_path / "out", **few)
    _, body = front_matter(tmp_path / "out")
    table = dict(
        line.strip("| ").split(" | ") for line in body.splitlines() if line.startswith(("| rel", "| calibrated"))
    )
    assert table["calibrated on"] == "4 samples of 16 random tokens, seed 0"
    assert table["relative output error, base + adapter"] == f"{report.totals['output_error']:.4f}"
    recipe = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert recipe == {**report.recipe, **few}


def test_a_card_says_how_close_the_start_is(tiny_llama, tmp_path):
    found = quantize(tiny_llama, tmp_path / "out", check=True).totals["check"]
    _, body = front_matter(tmp_path / "out")
    assert f"| KL from the original | {found['kl']:.4f} nats per token |\n" in body
    assert f"| same top token | {100 * found['top1_agreement']:.1f} % |\n" in body
    assert f"| measured on | {found['tokens']} tokens of random tokens, as there is no tokenizer |\n" in body


def test_notes_stand_in_the_card(tmp_path):
    quantize(make_checkpoint(tmp_path / "m", intermediate_size=80), tmp_path / "out")
    assert (
        "\n- 4 modules named gate_proj and up_proj stay as they are: 80 x 64"
        in (tmp_path / "out/README.md").read_text()
    )


@pytest.mark.parametrize("directory", ["out", 'a"b', "C:\\new", "modèle", "it's"])
def test_the_lines_to_load_are_python_for_any_directory(directory):
    tree = ast.parse("\n".join(load_snippet("LlamaForCausalLM", directory)))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert len(calls) == 2
    constants = [argument.value for call in calls for argument in call.args if isinstance(argument, ast.Constant)]
    assert constants == [directory, directory]


@pytest.mark.parametrize(
    ("family", "model_class"),
    [
        ("llama", "LlamaForCausalLM"),
        ("bert", "BertForMaskedLM"),
        ("llama", "LlamaForSequenceClassification"),  # PEFT trains its head whole
        ("t5", "T5ForConditionalGeneration"),
    ],
)
def test_the_lines_to_load_do_load(family, model_class, tmp_path, monkeypatch):
    source = make_checkpoint(tmp_path / "source", family, model_class=model_class)
    quantize(source, tmp_path / "out", format="dense", target_modules=r".*\.(layers?|block)\..*")
    monkeypatch.chdir(tmp_path / "out")
    _, body = front_matter(tmp_path / "out")
    names = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys.*")
        exec(body.split("```python\n")[1].split("```")[0], names)
    assert type(names["base"]).__name__ == model_class
    learning = (name for name, value in names["model"].named_parameters() if value.requires_grad)
    trained = {name.replace(".modules_to_save", "").replace(".default", "") for name in learning}
    assert read_header(tmp_path / "out/eqft_init/adapter_model.safetensors").keys() <= trained


def test_code_of_the_checkpoint_s_own_is_loaded_by_its_auto_class(own_code, tmp_path):
    quantize(own_code, tmp_path / "out", format="dense", trust_remote_code=True)
    report = Report.read(tmp_path / "out")
    assert (report.source["class"], report.loader) == ("OwnForCausalLM", "AutoModelForCausalLM")
    names = {}
    exec("\n".join(snippet_of(report, str(tmp_path / "out"))), names)
    assert type(names["base"]).__name__ == "OwnForCausalLM"


class TestOnTheHub:
    @pytest.fixture
    def run(self, tiny_llama, tmp_path):
        report = quantize(tiny_llama, tmp_path / "out")
        return (tmp_path / "out/README.md").read_text(), report

    def front(self, text):
        return yaml.safe_load(text.split("---\n")[1])

    def test_the_lines_to_load_name_the_repository_and_nothing_else_of_the_body_changes(self, run):
        text, report = run
        card = hub_card(text, report, "me/tiny")
        body = text.split("---\n", 2)[2]
        assert card.split("---\n", 2)[2] == body.replace(
            'from_pretrained(".", ', 'from_pretrained("me/tiny", '
        ).replace('from_pretrained(base, ".", ', 'from_pretrained(base, "me/tiny", ')

    @pytest.mark.parametrize("trusted", ["", ", trust_remote_code=True"])
    def test_the_lines_of_an_earlier_qinit_which_named_another_class_are_replaced_too(self, run, trusted):
        text, report = run
        ours = "\n".join(load_snippet("LlamaForCausalLM", "."))
        theirs = "\n".join(load_snippet("AutoModel", ".")).replace('"auto")', f'"auto"{trusted})')
        assert theirs != ours
        assert hub_card(text.replace(ours, theirs), report, "me/tiny") == hub_card(text, report, "me/tiny")

    @pytest.mark.parametrize("model", ["meta-llama/Llama-3.2-1B", "gpt2"])
    def test_a_base_model_of_the_hub_is_related_to(self, run, model):
        text, report = run
        text = text.replace(f"base_model: {report.model}\n", f"base_model: {model}\n")
        front = self.front(hub_card(text, report, "me/tiny"))
        assert (front["base_model"], front["base_model_relation"]) == (model, "quantized")
        assert {"qinit", "eqft", "lora"} <= set(front["tags"])
        assert list(front)[:2] == ["base_model", "base_model_relation"]

    def test_a_directory_or_the_demo_is_no_base_model_there(self, run, tmp_path, monkeypatch):
        text, report = run
        monkeypatch.chdir(tmp_path)
        (tmp_path / "models/x").mkdir(parents=True)
        for local in (report.model, "models/x", "demo", "../y"):
            card = hub_card(text.replace(f"base_model: {report.model}\n", f"base_model: {local}\n"), report, "me/tiny")
            assert not {"base_model", "base_model_relation"} & self.front(card).keys()

    @pytest.mark.parametrize("text", ["", "# Mine\n", "---\n", "---\n: [\n---\nx", "---\n- a\n---\nx"])
    def test_a_card_of_another_form_is_left_alone(self, run, text):
        assert hub_card(text, run[1], "me/tiny") == text

    def test_mixed_widths_are_fetched_first(self):
        lines = load_snippet("LlamaForCausalLM", "me/x", packed_mixed=True, on_hub=True, revision="v2")
        assert lines == [
            "import qinit; from huggingface_hub import snapshot_download",
            'model = qinit.load(snapshot_download("me/x", revision="v2"), trainable=True)',
        ]
