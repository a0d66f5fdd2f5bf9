"""Imports every module of both packages, run by the interpreter of an installed environment.  Prints as JSON the
packages that were not there, with the modules that asked for them, and anything else that went wrong."""

import importlib
import json
import pkgutil
from collections import defaultdict

OTHERS = ("rehearsal.device", "standins", "__main__")  # modules under other packages' names; a program


def main() -> None:
    missing: dict[str, list[str]] = defaultdict(list)
    wrong: dict[str, str] = {}
    modules = 0
    for name in ("msconv", "msconv_runtime"):
        package = importlib.import_module(name)
        for found in pkgutil.walk_packages(package.__path__, f"{name}.", onerror=lambda _: None):
            if any(part in found.name for part in OTHERS):
                continue
            modules += 1
            try:
                importlib.import_module(found.name)
            except ModuleNotFoundError as e:
                missing[(e.name or "").partition(".")[0]].append(found.name)
            except Exception as e:
                wrong[found.name] = f"{type(e).__name__}: {e}"
    print(json.dumps({"modules": modules, "missing": missing, "wrong": wrong}))


if __name__ == "__main__":
    main()
