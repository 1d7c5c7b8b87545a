"""How good a model is on a text: perplexity, and how close it is to the model that it was made from."""
