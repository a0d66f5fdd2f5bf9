"""Import-only stand-in for torchvision (its PyPI builds need CUDA libraries)."""

from . import io as io
from . import transforms as transforms

__version__ = "0.0.0+standin"
