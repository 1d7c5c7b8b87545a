"""SNN-DLFT in any Trainer of transformers: ranks are allocated and layers chosen by a callback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from qinit.errors import CheckpointError, RecipeError
from qinit.snndlft.config import SnnDlftConfig
from qinit.snndlft.course import Course, Moment

STATE_NAME = "snndlft.safetensors"  # in each of the Trainer's checkpoints


class DynamicLayers(TrainerCallback):
    """Give it to a Trainer of a model that `adapt` made, with the same configuration. What happens stays in `course`;
    `progress` gets each moment that the Trainer logs.

    A run that goes on from one of its own checkpoints ends as if it had not stopped. One process, and one GPU or none.
    Raises RecipeError at the start of a training that is too short for the schedule, or of a model without AdaLoRA.
    """

    def __init__(self, config: SnnDlftConfig, progress: Callable[[Moment], None] = lambda moment: None) -> None:
        self.config, self.progress = config, progress
        self.course: Course | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        tuner: Any = getattr(objects["model"], "base_model", None)
        if not hasattr(tuner, "rankallocator"):
            raise RecipeError("DynamicLayers: the Trainer's model has no AdaLoRA adapter; make it with adapt()")
        self.config.require_steps(state.max_steps)
        tuner.peft_config[tuner.trainable_adapter_name].total_step = state.max_steps
        self.course = Course(self.config, tuner, objects["optimizer"])
        if state.global_step:
            self._restore(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        assert self.course is not None
        self.course.after_step(state.global_step + 1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **objects: Any) -> None:
        if self.course is not None and logs and "loss" in logs:
            self.progress(self.course.note(state.global_step, float(logs["loss"])))

    def on_save(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        assert self.course is not None
        tensors, values = self.course.state()
        place = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        contiguous = {name: value.contiguous() for name, value in tensors.items()}
        save_file(contiguous, place / STATE_NAME, {"": json.dumps(values)})

    def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Have the adapter saved with the triplets that are in use alone. Until here checkpoints hold all of them, as
        the Trainer loads these into a model that has all."""
        assert self.course is not None
        self.course.allocator.peft_config.rank_pattern = self.course.in_use()

    def _restore(self, checkpoint: Path) -> None:
        assert self.course is not None
        file = checkpoint / STATE_NAME
        try:
            with safe_open(file, "pt") as stored:
                values = json.loads(stored.metadata()[""])
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - it is no dict
            if values["config"] != self.config.model_dump(mode="json"):
                raise CheckpointError(f"{file}: was written with other options; give these, or start anew")
            self.course.restore(tensors, values)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{file}: cannot be gone on from ({type(error).__name__}: {error}); resume from a checkpoint that this "
                "callback has saved in the Trainer's output_dir"
            ) from None
