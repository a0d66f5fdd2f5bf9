from . import functional as functional
from . import v2 as v2
from .functional import InterpolationMode as InterpolationMode
from .functional import __getattr__ as __getattr__
