"""A slot without artifacts, for comparison: SGLang searches this package for model classes."""
