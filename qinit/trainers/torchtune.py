"""torchtune, which starts from no adapter but its own."""

from __future__ import annotations

from qinit.trainers.base import Untrainable


class TorchtuneTrainer(Untrainable):
    name = "torchtune"
    title = "torchtune"
    seen = "by the source of torchtune (bd2a0fc)"
    reason = (
        "its recipes make a new adapter: adapter_model.pt is read only beside a recipe_state.pt of its own, to resume "
        "(FullModelHFCheckpointer in torchtune/training/checkpointing/_checkpointer.py), with one rank and one alpha "
        "for all layers; it is no longer maintained; use --trainer trl or transformers"
    )
