"""Imports SGLang's side with msconv beside it, run by the interpreter of an installed environment.

That is the engine, the HTTP server, the MindSpore slot and the benchmark; then SGLang loads its plug-ins.  Prints
as JSON its version, how many places msconv changes, how many of them SGLang could change, and what was logged.
"""

import importlib
import io
import json
import logging

from msconv_runtime.sglang.environment import use_cpu

MODULES = (
    "sglang",
    "sglang.srt.server_args",
    "sglang.srt.entrypoints.engine",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.model_executor.model_runner",
    "sglang.srt.models.mindspore",
    "sglang.bench_serving",
)


def main() -> None:
    said = io.StringIO()
    logging.basicConfig(level="WARNING", stream=said)
    use_cpu()
    for name in MODULES:
        importlib.import_module(name)
    plugins = importlib.import_module("sglang.srt.plugins")
    registry = importlib.import_module("sglang.srt.plugins.hook_registry").HookRegistry
    plugins.load_plugins()
    found = {
        "version": importlib.import_module("sglang").__version__,
        "registered": len(registry._hooks),
        "changed": len(registry._patched),
        "log": said.getvalue(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
