from qinit.source import demo


def test_the_demo_directory_is_a_package_that_ships_with_qinit():
    assert (demo.demo_directory() / "__init__.py").is_file()


def test_the_demo_model_can_be_planned_and_is_small_enough_to_ship():
    from qinit.planner.make import make_plan
    from qinit.recipe import make_recipe

    plan = make_plan(make_recipe(), demo.demo_directory(), demo.DEMO_NAME)
    assert plan.checkpoint.weight_bytes <= 16e6
    assert {layer.kept for layer in plan.layers} == {None}
    assert {layer.target.tensor.dtype.itemsize for layer in plan.layers} == {2}
    width = plan.checkpoint.config["hidden_size"]
    assert width % 64 == 0


def test_the_held_out_text_fills_many_windows_and_its_tokenizer_loads_as_trained():
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    directory, text = demo.demo_directory(), demo.held_out_text()
    tokens = AutoTokenizer.from_pretrained(directory)(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert len(tokens) > 20 * 512
    # transformers replaces some architectures' pre-tokenizers, which would silently spoil every perplexity.
    assert tokens == Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text, add_special_tokens=False).ids


def test_the_new_domain_is_code_and_test_modules_are_not_trained_on():
    training, test = demo.new_domain()
    assert (training, test) == demo.new_domain()
    assert 60_000 <= len(test) < 70_000
    assert len(training) > 1_000_000
    lines = [{line for line in text.splitlines() if len(line) > 60} for text in (training, test)]
    assert len(lines[0] & lines[1]) < 0.1 * len(lines[1])  # arguments that modules share


def test_the_code_has_no_docstrings_and_no_comments():
    from qinit_demo.source_code import _cut, _without_docstrings

    source = b'"About it."\nclass A:  # a class\n    "One."\n    "Two."\n    def f(self): "Doc."; return 3\n'
    assert _without_docstrings(source) == "class A:\n\n    def f(self):\n        return 3\n"
    assert _without_docstrings(b"def :") == ""
    assert _cut("one\ntwo\nthree\n", 10) == "one\ntwo\n"
