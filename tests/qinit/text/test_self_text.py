import json

import pytest
import torch

from qinit.errors import CalibrationError
from qinit.source.checkpoint import read_json
from qinit.source.demo import demo_directory
from qinit.text import self_text
from qinit.text.self_text import LARGEST_BATCH, batch_size, write_text
from qinit.text.sources import check_source, load_samples
from tests.models import make_checkpoint

CPU = torch.device("cpu")
EOS = 2


def write(directory, start=1, *, samples=3, length=12, seed=0, **options):
    return write_text(directory, start, samples=samples, length=length, seed=seed, device=CPU, **options)


def change(file, **values):
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **values}))


def load(directory, **options):
    config = read_json(directory / "config.json", "")
    check_source("self", directory, config)
    return load_samples("self", directory, config, **{"samples": 3, "length": 12, "seed": 0, **options})


def refusal(directory, planned=True):
    config = read_json(directory / "config.json", "")
    with pytest.raises(CalibrationError) as caught:
        load_samples("self", directory, config, samples=2, length=4, seed=0)
    if planned:
        with pytest.raises(CalibrationError) as early:
            check_source("self", directory, config)
        assert str(early.value) == str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def opinionated(tmp_path):
    """A model of 32 ids with one strong opinion: eos comes next in about a third of all cases."""
    from transformers import AutoModelForCausalLM

    directory = make_checkpoint(tmp_path / "model", dtype="float32", vocab_size=32, initializer_range=0.3)
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        logits = model(torch.tensor([[1]])).logits[0, -1]
        state = model.model(torch.tensor([[1]])).last_hidden_state[0, -1]
        rest = torch.logsumexp(torch.cat([logits[:EOS], logits[EOS + 1 :]]), 0)
        wanted = rest + torch.log(torch.tensor(0.5))  # p = 0.5 / 1.5
        model.lm_head.weight[EOS] += (wanted - logits[EOS]) * state / state.square().sum()
    model.save_pretrained(directory)
    return directory


def next_token_probabilities(directory, *ids):
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory)(torch.tensor([ids])).logits[0, -1].softmax(-1)


def test_a_text_starts_with_bos_and_has_the_length_that_was_asked_for(tiny_llama):
    found = load(tiny_llama)
    assert found.tokens.shape == (3, 12)
    assert found.tokens.dtype == torch.int64
    assert found.tokens[:, 0].tolist() == [1, 1, 1]
    assert found.mask is None
    assert found.origin == "3 texts of 12 tokens that the model wrote itself, seed 0"


def test_no_tokenizer_is_needed_and_the_length_is_cut(tiny_llama):
    assert not (tiny_llama / "tokenizer.json").exists()
    assert load(tiny_llama, samples=1, length=1000).tokens.shape == (1, 128)


def test_the_seed_decides_and_the_caller_s_generator_is_left_alone(tiny_llama):
    state = torch.get_rng_state()
    first, again, other = (write(tiny_llama, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_texts_differ_from_each_other_within_and_between_batches(tiny_llama):
    texts = write(tiny_llama, samples=5, memory=1)  # one text at a time
    assert len({tuple(row) for row in texts.tolist()}) == 5
    assert write(tiny_llama, samples=LARGEST_BATCH["cpu"] + 2, length=3).shape == (LARGEST_BATCH["cpu"] + 2, 3)


def test_tokens_come_from_the_model_s_own_distribution_eos_included(opinionated):
    # Whatever the generation configuration prefers: it is for chatting.
    chatting = {"temperature": 0.1, "top_k": 2, "repetition_penalty": 3.0, "suppress_tokens": [EOS, 5]}
    change(opinionated / "generation_config.json", do_sample=True, **chatting)
    expected = next_token_probabilities(opinionated, 1)
    assert 0.3 < expected[EOS] < 0.36
    count = 3000
    found = write(opinionated, samples=count, length=2)[:, 1].bincount(minlength=32) / count
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1e-3).all()


def test_unlikely_tokens_are_written_too(tiny_llama):
    """transformers' own default keeps the 50 likeliest only."""
    followers = write(tiny_llama, samples=1000, length=2)[:, 1]
    assert len(followers.unique()) > 200


def test_text_goes_on_behind_eos(opinionated):
    expected = next_token_probabilities(opinionated, 1, EOS)
    texts = write(opinionated, samples=3000, length=3)
    behind = texts[texts[:, 1] == EOS][:, 2]
    assert len(behind) > 800
    found = behind.bincount(minlength=32) / len(behind)
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / len(behind)).sqrt() + 2e-3).all()


def test_the_start_is_bos_else_eos_from_either_configuration(tmp_path):
    directory = make_checkpoint(tmp_path / "model", bos_token_id=None, eos_token_id=None)
    (directory / "generation_config.json").unlink(missing_ok=True)
    message = refusal(directory)
    assert "needs a token to start from" in message
    assert "bos_token_id or an eos_token_id; calibrate on a text file or on `random`" in message
    change(directory / "generation_config.json", eos_token_id=[7, 8])
    assert load(directory).tokens[:, 0].tolist() == [7, 7, 7]
    change(directory / "generation_config.json", bos_token_id=6)
    assert load(directory).tokens[:, 0].tolist() == [6, 6, 6]
    change(directory / "config.json", bos_token_id=5)
    assert load(directory).tokens[:, 0].tolist() == [5, 5, 5]


def test_a_start_outside_the_vocabulary(tiny_llama):
    change(tiny_llama / "config.json", bos_token_id=256)
    assert "has id 256, but vocab_size is 256" in refusal(tiny_llama)


@pytest.mark.parametrize("family", ["gpt2", "gemma", "opt", "llava"])
def test_other_families_write_too(tmp_path, family):
    assert load(make_checkpoint(tmp_path / family, family)).tokens.shape == (3, 12)


def test_the_demo_model_writes_its_own_kind_of_text():
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(demo_directory()).decode(
        load(demo_directory(), samples=1, length=64).tokens[0]
    )
    assert len(text.split()) > 15


def test_missing_weights_are_an_error_since_they_would_be_random(tmp_path):
    directory = make_checkpoint(tmp_path / "model", "llama", model_class="LlamaModel")
    change(directory / "config.json", architectures=["LlamaForCausalLM"])
    assert "lacks 1 weights of LlamaForCausalLM (lm_head.weight)" in refusal(directory, planned=False)


def test_weights_that_cannot_be_loaded(tiny_llama):
    (tiny_llama / "model.safetensors").write_bytes(b"nonsense")
    message = refusal(tiny_llama, planned=False)
    assert message.startswith(f"{tiny_llama}: the model cannot be loaded to write its own text (")


def test_a_model_that_predicts_nan(tmp_path):
    from safetensors.torch import load_file, save_file

    directory = make_checkpoint(tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][:] = float("nan")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert "the model predicts NaN or Inf in torch.float32" in refusal(directory, planned=False)


def test_other_errors_are_not_swallowed(tiny_llama, monkeypatch):
    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr("qinit.text.self_text._sample", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        write(tiny_llama)


def test_a_portion_is_written_at_once(tiny_llama, monkeypatch):
    asked, written = [], []

    def half(most):
        asked.append(most)
        return most // 2

    def sample(model, start, count, length):
        written.append(count)
        return torch.zeros(count, length)

    monkeypatch.setattr(self_text, "_sample", sample)
    assert write(tiny_llama, samples=5, portion=half).shape == (5, 12)
    assert (asked, written) == ([5], [2, 2, 1])


def test_the_batch_is_bounded_by_memory():
    from transformers import LlamaConfig

    config = LlamaConfig(
        **{"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096, "vocab_size": 32000},
    )
    # 2 * 32 layers * 4096 values * 2 bytes * 2048 tokens are 1 GiB per text; the logits add half a megabyte.
    assert batch_size(config, 2048, 2, CPU, memory=4 * 2**30) == 3
    assert batch_size(config, 2048, 2, CPU, memory=1) == 1
    assert batch_size(config, 1, 2, CPU, memory=2**40) == LARGEST_BATCH["cpu"]


@pytest.mark.parametrize(("memory", "expected"), [(2**40, torch.float32), (2**10, torch.bfloat16)])
def test_a_cpu_computes_in_float32_where_the_memory_is_enough(tmp_path, monkeypatch, memory, expected):
    directory = make_checkpoint(tmp_path / "model", dtype="bfloat16")
    monkeypatch.setattr(self_text, "total_memory", lambda device: memory)
    ran = []
    monkeypatch.setattr(self_text, "_sample", lambda model, *_: ran.append(model.dtype) or torch.zeros(3, 12))
    write(directory)
    assert ran == [expected]
