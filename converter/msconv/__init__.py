"""msconv: Hugging Face checkpoint in, serving artifact for Ascend out.  Runs on any machine."""

from msconv_runtime import __version__

__all__ = ["__version__"]
