import pytest
import torch

from qinit.adapters import write_config
from qinit.adapters.reading import SavedAdapter
from qinit.errors import CheckpointError
from qinit.recipe import make_recipe
from tests.qinit.adapters.test_lora import DOWN, LLAMA, LORA, OTHER_DOWN, SMALL, UP, low_rank


class TestStored:
    """An adapter as it is read back."""

    CPU = torch.device("cpu")
    SCALES = ({}, {"lora_alpha": 12}, {"use_rslora": True}, {"lora_alpha": 3, "use_rslora": True})

    def write(self, directory, ranks, more=None, config=None, **options):
        from safetensors.torch import save_file

        recipe = make_recipe(rank=4, **options)
        tensors = dict(more or {})
        for module, rank in ranks:
            tensors |= LORA.encode(module, low_rank(module, rank), rank, recipe.lora_scale, 0)
        directory.mkdir(exist_ok=True)
        contiguous = {name: value.contiguous() for name, value in tensors.items()}
        save_file(contiguous, directory / "adapter_model.safetensors")
        write_config(directory, {**LORA.config(recipe, LLAMA, ranks, "base"), **(config or {})})
        return directory

    @pytest.mark.parametrize("options", SCALES)
    def test_the_product_is_the_low_rank_that_was_written_whatever_the_scale_and_the_rank(self, tmp_path, options):
        ranks = [(UP, 4), (DOWN, 2), (OTHER_DOWN, 4)]
        found = SavedAdapter.open(self.write(tmp_path / "a", ranks, **options))
        for module, rank in ranks:
            factors = low_rank(module, rank)
            torch.testing.assert_close(found.change(module.name, self.CPU), factors.B @ factors.A)
        assert found.change(SMALL.name, self.CPU) is None

    @pytest.mark.parametrize("use_rslora", [False, True])
    def test_the_scale_is_peft_s(self, tmp_path, use_rslora):
        from peft import LoraConfig, get_peft_model
        from torch import nn

        patterns = {"rank_pattern": {r"blocks\.1\.up": 6}, "alpha_pattern": {"1.up": 5, "down": 7}}
        blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)}) for _ in range(2))
        model = nn.ModuleDict({"blocks": blocks})
        config = LoraConfig(r=4, lora_alpha=3, target_modules=["up", "down"], use_rslora=use_rslora, **patterns)
        get_peft_model(model, config).save_pretrained(tmp_path)
        found = SavedAdapter.open(tmp_path)
        modules = {name: module for name, module in model.named_modules() if hasattr(module, "scaling")}
        theirs = {name: module.scaling["default"] for name, module in modules.items()}
        assert len(theirs) == 4
        ours = {name: LORA.scale(name, parts["A"].shape[0], found.settings) for name, parts in found.parts.items()}
        assert ours == theirs
        assert len(set(theirs.values())) == 3

    def test_a_parameter_trained_whole_is_let_pass_if_asked(self, tmp_path):
        more = {"base_model.model.score.weight": torch.zeros(2)}
        directory = self.write(tmp_path / "a", [(UP, 4)], more=more, config={"modules_to_save": ["score"]})
        assert SavedAdapter.open(directory, whole=True).parts.keys() == {UP.name}
        other = self.write(tmp_path / "b", [(UP, 4)], more={"base_model.model.x.lora_magnitude_vector": torch.zeros(2)})
        with pytest.raises(CheckpointError, match="lora_magnitude_vector"):
            SavedAdapter.open(other, whole=True)

    @pytest.mark.parametrize(
        ("config", "more", "said"),
        [
            ({"use_dora": True}, {}, "without its magnitude"),
            ({"lora_bias": True}, {}, "lora_bias"),
            ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save"),
            ({}, {"base_model.model.lm_head.weight": torch.zeros(2)}, "base_model.model.lm_head.weight"),
            ({}, {"base_model.model.x.lora_A.weight": torch.zeros(2, 2)}, "x with one of its factors"),
        ],
    )
    def test_what_adds_more_than_factors_is_refused(self, tmp_path, config, more, said):
        directory = self.write(tmp_path / "a", [(UP, 4)], more=more, config=config)
        with pytest.raises(CheckpointError, match=f"more than what LORA adds to weights .*{said}"):
            SavedAdapter.open(directory)

    def test_another_kind_is_refused(self, tmp_path):
        directory = self.write(tmp_path / "a", [(UP, 4)], config={"peft_type": "VERA"})
        with pytest.raises(CheckpointError, match="an adapter of peft_type 'VERA' is not read"):
            SavedAdapter.open(directory)
