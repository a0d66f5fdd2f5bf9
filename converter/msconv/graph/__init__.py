"""Static graphs: the model written once, the operations once per target, exported without weight bytes."""
