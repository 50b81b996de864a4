"""What the client is told, and when."""
