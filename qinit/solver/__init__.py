"""The solver: one weight matrix in, quantized matrix and low-rank factors out. Pure and deterministic."""
