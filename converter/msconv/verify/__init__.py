"""Numerical proof: an artifact's own graphs and bytes against transformers on the source checkpoint."""
