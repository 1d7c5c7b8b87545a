"""Bytes: files vetted before they are read, safetensors by byte range, sums, writes that are whole or nothing."""
