from ..functional import InterpolationMode as InterpolationMode
from ..functional import __getattr__ as __getattr__
from . import functional as functional
