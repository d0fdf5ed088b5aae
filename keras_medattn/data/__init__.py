"""Data sets: which images there are, and how their bytes become pixels."""
