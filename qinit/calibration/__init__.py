"""Calibration: text for a model to read, and what its layers see while it does."""
