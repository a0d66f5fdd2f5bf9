"""The artifact's directory while it is made: its name, its lock, what may be put there, how far it has come, what
is recorded in it."""
