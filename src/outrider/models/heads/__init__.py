"""Draft heads: published checkpoints of every layout, read into one description and one naming."""
