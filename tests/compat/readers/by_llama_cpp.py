"""DIR IDS OUT: saves llama.cpp's logits [tokens, vocabulary] of base and adapter for a row of ids."""

import sys
from pathlib import Path

import numpy as np
from llama_cpp import Llama

directory, ids, out = Path(sys.argv[1]), np.load(sys.argv[2]), sys.argv[3]
model = Llama(
    str(directory / "model.gguf"),
    lora_path=str(directory / "adapter.gguf"),
    n_ctx=len(ids),
    n_batch=len(ids),
    n_ubatch=len(ids),
    logits_all=True,
    n_threads=1,
    n_threads_batch=1,
    type_k=0,  # float32: only the kernels' own rounding is left
    type_v=0,
    verbose=False,
)
model.eval(ids.tolist())
np.save(out, np.array(model.scores[: len(ids)], dtype=np.float32))
