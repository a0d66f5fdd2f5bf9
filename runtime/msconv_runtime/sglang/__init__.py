"""SGLang's MindSpore slot, filled with an artifact: plug-in, model class, and what only a CPU needs.

SGLang searches this package for model classes (SGLANG_EXTERNAL_MODEL_PACKAGE); only `slot` has one.
"""
