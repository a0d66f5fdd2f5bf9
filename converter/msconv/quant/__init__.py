"""Number formats of quantised checkpoints, and turning matrices over: independent of any model family."""
