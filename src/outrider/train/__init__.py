"""Training of the demo pair, and growth of a checkpoint to a larger shape."""
