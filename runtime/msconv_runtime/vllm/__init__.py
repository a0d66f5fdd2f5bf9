"""vLLM's model slot on a CPU, filled with an artifact: plug-in, model class, loader, and the command."""
