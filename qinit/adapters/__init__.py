"""Adapters: how the low-rank part is stored so that PEFT trains it."""
