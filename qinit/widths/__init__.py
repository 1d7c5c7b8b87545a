"""A width for each layer: what its error costs the model, and the choice under a budget."""
