"""Whether speculation leaves the output alone: tokens, laws, every draw of a sampled run."""
