"""Which guesses stand: one file per acceptance rule, each reading a tree and the target's laws."""
