"""Import-only stand-in for sgl_kernel (no CPU build on PyPI).

SGLang imports its names under SGLANG_USE_CPU_ENGINE; without AMX only speculative decoding calls them.
"""

from typing import Any

__version__ = "0.0.0+standin"


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def unavailable(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"sgl_kernel.{name} is not available: this is msconv's import-only stand-in")

    return unavailable
