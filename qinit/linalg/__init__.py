"""Linear algebra on plain tensors: low rank, weighted norms, what H makes of a matrix. No word of qinit's in it."""
