"""Adapter configurations in the shape of PEFT's adapter_config.json, as `--recipe NAME` takes them."""
