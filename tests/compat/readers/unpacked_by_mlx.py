"""DIR OUT: saves the weight [out, in] in float32 that mlx unpacks of each packed layer, as OUT/NAME.npy."""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.utils import load_model

directory, out = Path(sys.argv[1]), Path(sys.argv[2])
model, _ = load_model(directory)
model.set_dtype(mx.float32)
out.mkdir()
for name, layer in model.named_modules():
    if isinstance(layer, nn.QuantizedLinear):
        weight = mx.dequantize(layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits)
        np.save(out / f"{name}.npy", np.array(weight))
