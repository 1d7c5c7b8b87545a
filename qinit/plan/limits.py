"""Numbers that a plan, its estimates and the run itself must agree on."""

from __future__ import annotations

CHECK_WINDOW = 512  # tokens of a window that a run is measured on at its end, or what the model takes if that is less
LARGEST_SHARE = 0.5  # of the free memory that a model may take for writing its text
GRADIENT_SAMPLES, GRADIENT_LENGTH = 16, 256  # of the text are taken forward and back
GRADIENT_PASSES = 8  # forward twice and a pass back, in forward passes
GRADIENT_BATCH_TOKENS, GRADIENT_LOGITS_BYTES = 1024, 1 << 28  # of a batch of it, at most, and of its logits
