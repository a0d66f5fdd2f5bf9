"""Imports SGLang's side with msconv beside it, run by the interpreter of an installed environment.

That is the engine, the HTTP server, the MindSpore slot and the benchmark; then SGLang loads its plug-ins.  Prints
as JSON its version, how many places msconv changes, how many of them are changed, and what was logged.
"""

import importlib
import io
import json
import logging
import pkgutil

from msconv_runtime.sglang import changes
from msconv_runtime.sglang.environment import use_cpu
from msconv_runtime.sglang.plugin import CHANGES

MODULES = (
    "sglang",
    "sglang.srt.server_args",
    "sglang.srt.entrypoints.engine",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.model_executor.model_runner",
    "sglang.srt.models.mindspore",
    "sglang.bench_serving",
)


def is_changed(place: str) -> bool:
    """Whether msconv's code is called at a place of SGLang's."""
    try:
        return bool(pkgutil.resolve_name(place).__code__.co_filename == changes.__file__)
    except (ImportError, AttributeError):
        return False


def main() -> None:
    said = io.StringIO()
    logging.basicConfig(level="WARNING", stream=said)
    use_cpu()
    for name in MODULES:
        importlib.import_module(name)
    plugins = importlib.import_module("sglang.srt.plugins")
    plugins.load_plugins()
    places = {change.place for change in CHANGES}
    found = {
        "version": importlib.import_module("sglang").__version__,
        "to change": len(places),
        "changed": sum(map(is_changed, places)),
        "log": said.getvalue(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
