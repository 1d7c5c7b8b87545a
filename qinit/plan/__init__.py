"""The plan of a run, data only: every layer, every byte, before any weight is read."""
