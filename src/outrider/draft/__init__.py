"""Guess: one file per way to draft."""
