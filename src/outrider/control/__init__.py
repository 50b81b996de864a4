"""Whether to speculate, with whom, and how far."""
