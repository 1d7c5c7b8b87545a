"""The Hub: a model id becomes a local directory, a finished run goes there."""
