"""Text for a model to read: from a file, the Hub, the model itself or at random, as token ids."""
