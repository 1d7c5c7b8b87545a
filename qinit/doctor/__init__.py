"""What works in this environment, and what it takes to get the rest."""
