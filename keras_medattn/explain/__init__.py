"""Where a model looked: heatmaps, overlays, and their measure against known places."""
