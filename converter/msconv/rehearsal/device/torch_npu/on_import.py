"""MindSpore and Triton get their stand-ins when SGLang imports them."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from typing import Any

AFTER = {"mindspore": "torch_npu.mindspore_ascend", "triton.runtime.interpreter": "torch_npu.triton_host"}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds a module where it is, and has the stand-in installed once it has run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        standin = AFTER.get(name)
        if standin is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            AFTER.pop(name, None)  # not before: who only looks for a module does not import it
            run(module)
            importlib.import_module(standin).install(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder())
