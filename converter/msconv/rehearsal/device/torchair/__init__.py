"""What torch.compile uses on an NPU: nothing is compiled in a rehearsal, and any part of it can be imported."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from typing import Any


class CompilerConfig:
    """Takes any setting."""

    class _Any:
        def __getattr__(self, name: str) -> Any:
            value = self.__dict__[name] = type(self)()
            return value

    def __init__(self) -> None:
        self.mode, self.experimental_config, self.debug = "max-autotune", self._Any(), self._Any()


def get_npu_backend(compiler_config: Any = None) -> str:
    return "eager"


class _Parts(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return (
            importlib.machinery.ModuleSpec(name, self, is_package=True) if name.startswith("torchair.") else None
        )

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        module.CompilerConfig = CompilerConfig


sys.meta_path.append(_Parts())
