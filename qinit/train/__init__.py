"""Training: a polish of all adapters together, and the fine-tuning that starts are compared by."""
