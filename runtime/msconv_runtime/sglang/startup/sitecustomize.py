"""Read by Python as it starts a process of a server, before the first import (see `environment`).

Searches for garbage are rare until the plug-in has imported SGLang.  What the machine's own file of this name says
is done as well.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

try:
    from msconv_runtime.sglang.garbage import search_rarely
except ImportError:  # of another Python, started by a server
    pass
else:
    search_rarely()

HERE = Path(__file__).resolve().parent
elsewhere = PathFinder.find_spec("sitecustomize", [path for path in sys.path if Path(path).resolve() != HERE])
if elsewhere is not None and elsewhere.loader is not None:
    elsewhere.loader.exec_module(module_from_spec(elsewhere))
