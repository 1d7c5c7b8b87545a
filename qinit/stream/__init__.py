"""A model that is larger than memory: one block at a time, and the hidden states between two."""
