"""Where a run works and what it has finished: place, lock, journal, tensors, and going on with all of it."""
