"""A finished run and an adapter on it become one checkpoint: W' = Q + s B A, never the 16-bit original's W; and several
adapters of one base become one adapter."""
