"""Pure planning: which byte of which source tensor goes where.  No disk, no network, no model names."""
