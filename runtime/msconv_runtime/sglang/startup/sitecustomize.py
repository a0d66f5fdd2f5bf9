"""Read by Python as it starts a process of a server, before the first import (see `environment`).

Searches for garbage are rare until the plug-in has imported SGLang.  What the machine's own file of this name says
is done as well.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

if any("sglang" in word or "multiprocessing" in word for word in sys.orig_argv):  # no other Python of a server's
    try:
        from msconv_runtime.sglang.garbage import search_rarely
    except ImportError:  # of an environment without msconv
        pass
    else:
        search_rarely()

places = [Path(path).resolve() for path in sys.path]
here = places.index(Path(__file__).resolve().parent)
found = PathFinder.find_spec("sitecustomize", sys.path[here + 1 :])
if found is not None and found.loader is not None:
    sys.modules["sitecustomize"] = module = module_from_spec(found)
    found.loader.exec_module(module)
