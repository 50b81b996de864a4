"""Training of draft heads and small draft models on a frozen target, in one process."""
