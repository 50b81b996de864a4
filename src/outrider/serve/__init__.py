"""The server: HTTP in the dialects people know, over one engine."""
