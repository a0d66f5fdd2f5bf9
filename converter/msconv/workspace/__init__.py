"""The artifact's directory while it is made: what is there, what may be put there, and notes beside it."""
