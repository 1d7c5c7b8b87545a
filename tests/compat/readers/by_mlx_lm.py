"""DIR IDS OUT: saves mlx-lm's logits [tokens, vocabulary] of base and adapter for a row of ids."""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

directory, ids, out = Path(sys.argv[1]), np.load(sys.argv[2]), sys.argv[3]
model, _ = load_model(directory)
model = load_adapters(model, str(directory / "adapters"))
model.eval()
model.set_dtype(mx.float32)  # only the products' own rounding is left
np.save(out, np.array(model(mx.array(ids[None]))[0]))
