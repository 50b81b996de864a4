"""Draft length by load: predicted, measured, and what follows from it."""
