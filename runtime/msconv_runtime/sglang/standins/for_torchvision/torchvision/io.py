"""Names that are imported and, for text models, never called."""

from enum import Enum
from typing import Any


class ImageReadMode(Enum):
    RGB = "RGB"
    GRAY = "GRAY"
    UNCHANGED = "UNCHANGED"


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def unavailable(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"torchvision.io.{name} is not available: this is msconv's import-only stand-in")

    return unavailable
