"""The draft doctor: whether a draft is run as it was trained, and what it may bring."""
