"""What the stock loaders do with a plan, and the model with its layers, tried on the skeleton without weights."""
