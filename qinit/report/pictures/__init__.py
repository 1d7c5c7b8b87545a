"""A report as pictures: one PNG, and one HTML page with hover that holds all it needs and loads nothing."""
