"""Measuring generated videos: what `python -m sfjax.evaluate` is made of."""
