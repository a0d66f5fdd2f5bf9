"""msconv's runtime: artifact in, logits out.  Lives inside the server and never imports the converter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .session import Session as Session

__version__ = "0.1.0"
__all__ = ["Session", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Session":  # MindSpore takes seconds to import: only for those who compute
        from .session import Session

        return Session
    raise AttributeError(name)
