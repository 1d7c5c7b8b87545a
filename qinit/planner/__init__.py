"""Makes the plan: recipe and checkpoint in, layers, widths, time and memory out."""
