"""The model to start from: its checkpoint on disk, its skeleton without weights, the layers to quantize."""
