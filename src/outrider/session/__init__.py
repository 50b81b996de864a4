"""What survives between turns: the token log, and what of the warm state is kept beside it."""
