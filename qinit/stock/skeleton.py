"""The model of a checkpoint without weights, built as often as it is asked for; two of the same configuration are
equal, so that what was found out about one is known of the other."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from qinit.source.checkpoint import Checkpoint
from qinit.source.skeleton import build_model


@dataclass(frozen=True)
class Skeleton:
    """What a model is built from: its configuration, and the code that the checkpoint brings where that is trusted."""

    configuration: str
    code: str
    checkpoint: Checkpoint = field(compare=False)

    @classmethod
    def of(cls, checkpoint: Checkpoint, trust_remote_code: bool = False) -> Skeleton:
        code = str(checkpoint.directory) if trust_remote_code else ""
        return cls(json.dumps(checkpoint.config, sort_keys=True), code, checkpoint)

    def build(self, *, include_buffers: bool = True) -> Any:
        """Build it on the meta device, as `build_model` does."""
        return build_model(self.checkpoint, include_buffers=include_buffers, trust_remote_code=bool(self.code))
