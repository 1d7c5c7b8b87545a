"""Methods side by side: where each starts on one model, and where the same fine-tuning ends."""
