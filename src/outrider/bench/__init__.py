"""Measure: speed-up with an interval, on one engine, in one run."""
