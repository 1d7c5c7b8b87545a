from qinit.planner.memory import (
    carried_bytes,
    polish_disk_bytes,
    polishing_bytes,
    scratch_bytes,
    seen_before_polish,
    tokens_of_polish,
    working_bytes,
)
from tests.helpers import plan_of
from tests.models import make_checkpoint, make_reader


def test_working_memory_depends_on_the_largest_layer_only(tmp_path):
    two, four = (plan_of(make_checkpoint(tmp_path / str(n), num_hidden_layers=n)) for n in (2, 4))
    assert working_bytes(two) == working_bytes(four) > 0
    assert two.bytes_before < four.bytes_before


def test_working_memory_grows_with_the_text_the_mode_and_the_widest_layer(tmp_path, tiny_llama, monkeypatch):
    monkeypatch.setattr("qinit.planner.memory.LOGITS_COPIES", 0)  # the pass back needs more than layers this small

    def needed(directory=tiny_llama, **options):
        samples = {"calibration": "random", "calibration_samples": 8, "calibration_length": 16}
        return working_bytes(plan_of(directory, **{**samples, **options}))

    plain = working_bytes(plan_of(tiny_llama))
    assert plain < needed(calibration_mode="parallel") < needed()
    # Float32: three times the hidden states, width 64, and half of what the seven layers read.
    assert needed(calibration_samples=16) - needed() == 4 * (3 * 64 + (6 * 64 + 128) // 2) * 8 * 16
    assert needed(calibration_length=32) == needed(calibration_samples=16)
    assert needed(make_checkpoint(tmp_path / "wide", intermediate_size=256)) > needed()
    assert needed(make_checkpoint(tmp_path / "deep", num_hidden_layers=4)) == needed()


def test_working_memory_counts_the_head_and_the_logits_of_the_pass_back(tmp_path):
    directory = make_checkpoint(tmp_path / "many-words", vocab_size=50_000)
    plan = plan_of(directory, calibration="random")
    assert working_bytes(plan) == 4 * (2 * 50_000 + 1) * 64 + 4 * 4 * 1024 * 50_000


def test_working_memory_counts_what_needs_the_whole_model(tiny_llama):
    few = {"calibration_samples": 1, "calibration_length": 2}
    plan = plan_of(tiny_llama, calibration="random", **few)
    parameters, weights = plan.bytes_before // 2, sum(layer.weights for layer in plan.quantized)
    assert working_bytes(plan_of(tiny_llama, calibration="self", **few)) == max(
        working_bytes(plan), 2 * plan.bytes_before
    )
    fisher = working_bytes(plan_of(tiny_llama, calibration="random", method="lq-lora", format="dense", **few))
    assert fisher > 4 * parameters + 8 * weights


def test_a_large_model_that_writes_its_own_text_is_in_memory_as_a_whole(tmp_path):
    directory = make_checkpoint(tmp_path / "deep", num_hidden_layers=12)  # in float32 on a CPU
    few = {"calibration_samples": 1, "calibration_length": 2, "target_modules": "k_proj"}
    plan = plan_of(directory, calibration="self", **few)
    assert working_bytes(plan) == 2 * plan.bytes_before > working_bytes(plan_of(directory, calibration="random", **few))


def test_a_polish_has_the_codes_and_not_the_weights(tiny_llama):
    few = {"calibration": "random", "calibration_samples": 1, "calibration_length": 2, "polish": 1}
    plans = [plan_of(tiny_llama, **few, bits=bits) for bits in (2, 4, 8)]
    weights = sum(layer.weights for layer in plans[0].quantized)
    two, four, eight = map(polishing_bytes, plans)
    assert two == four == eight - weights // 2
    dense = polishing_bytes(plan_of(tiny_llama, **few, format="dense"))
    assert dense - two == 2 * weights - weights // 2
    assert working_bytes(plans[0]) >= two > 0


def test_a_polish_keeps_the_sources_outputs_on_disk(tiny_llama):
    few = {"calibration": "random", "calibration_samples": 1, "calibration_length": 2}
    assert polish_disk_bytes(plan_of(tiny_llama, **few)) == 0
    one, two = (polish_disk_bytes(plan_of(tiny_llama, **few, polish=steps)) for steps in (100, 200))
    assert two - one == 50 * 1024 * (2 * 64 + 6 * 64)


def test_what_calibration_saw_counts_beside_text_of_another_source(tmp_path):
    options = {"calibration": "self", "calibration_samples": 8, "calibration_length": 16, "polish": 100}
    own, both = (plan_of(make(tmp_path / make.__name__), **options) for make in (make_checkpoint, make_reader))
    assert tokens_of_polish(own, seen_before_polish(own)) == 50 * 1024
    assert tokens_of_polish(both, seen_before_polish(both)) == 50 * 1024 + 8 * 16


def test_hidden_states_are_on_disk_where_memory_does_not_hold_them(llama, monkeypatch):
    text = {"calibration": "random", "calibration_samples": 8, "calibration_length": 16}
    both, one = plan_of(llama, **text), plan_of(llama, **text, calibration_mode="parallel")
    assert carried_bytes(both) == 3 * carried_bytes(one) == 3 * 4 * 64 * 8 * 16
    assert scratch_bytes(both) == 0
    least = carried_bytes(both)
    monkeypatch.setattr("qinit.planner.memory.place_for", lambda size, place: place if size < least else None)
    of_a_block = 4 * 8 * 16 * (6 * 64 + 128) // 2  # what its layers read is on disk too
    assert scratch_bytes(both) == carried_bytes(both) + of_a_block
    assert scratch_bytes(one) == 0
    assert scratch_bytes(plan_of(llama)) == 0


def test_working_memory_counts_the_head_and_the_logits_of_the_check(tmp_path):
    directory = make_checkpoint(tmp_path / "many-words", vocab_size=50_000)
    embedding = head = 4 * 50_000 * 64
    norm = 4 * 64
    logits = 4 * 128 * 50_000  # of a window
    assert working_bytes(plan_of(directory, check=True)) == embedding + head + norm + head + 2 * 2 * logits
    assert working_bytes(plan_of(directory, check=False)) < head
