"""Training and evaluation: a recipe and data in, a run folder out."""
