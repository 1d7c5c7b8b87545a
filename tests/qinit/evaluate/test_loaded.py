import json

import pytest
import torch

from qinit.evaluate import loaded
from qinit.evaluate.loaded import batch_size_for, class_name, loaded_bytes
from qinit.evaluate.subject import Subject
from qinit.evaluate.windows import cut_windows
from tests.evaluated import CPU, TOKENS, subject

WINDOWS = cut_windows(TOKENS, 25)


class TestMemory:
    def test_dense_weights_take_the_dtype_s_bytes(self, source):
        numbers = loaded_bytes(Subject("m", source), torch.float32) / 4
        assert numbers == loaded_bytes(Subject("m", source), torch.bfloat16) / 2
        model = loaded.load_model(Subject("m", source), torch.float32, CPU)
        assert numbers == sum(parameter.numel() for parameter in model.parameters())

    def test_packed_ones_stay_as_they_are(self, source, packed):
        run = subject(packed)
        alone = loaded_bytes(Subject("base", packed), torch.float32)
        assert alone < loaded_bytes(run, torch.float32) < loaded_bytes(Subject("m", source), torch.float32)

    @pytest.mark.parametrize(("vocabulary", "rows"), [(256, 8), (2**20, 5), (2**25, 1)])
    def test_a_batch_is_as_large_as_its_logits_may_be(self, vocabulary, rows):
        assert batch_size_for(WINDOWS, vocabulary) == rows


def test_the_class_is_the_report_s_or_the_configuration_s(source, packed, tmp_path):
    assert class_name(Subject("m", source)) == class_name(subject(packed)) == "LlamaForCausalLM"
    bare = tmp_path / "bare"
    bare.mkdir()
    config = json.loads((source / "config.json").read_text())
    del config["architectures"]
    (bare / "config.json").write_text(json.dumps(config))
    assert class_name(Subject("m", bare)) == "AutoModelForCausalLM"
