"""What passes, drafts and the host cost here, and what that predicts."""
