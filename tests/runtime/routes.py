"""The paths of SGLang's own router, asked in a process of its own."""

from __future__ import annotations

import functools
import json
import os

from msconv_runtime.sglang.environment import cpu_environment
from tests.commands import run_python

CODE = """
import json
from sglang.srt.entrypoints.http_server import app
def paths(routes):
    for route in routes:
        if hasattr(route, "original_router"):
            yield from paths(route.original_router.routes)
        else:
            yield route.path
print(json.dumps(sorted(set(paths(app.routes)))))
"""


@functools.cache
def sglang_routes() -> tuple[str, ...]:
    """As SGLang spells them, `/v1/models/{model:path}`."""
    before = dict(os.environ)
    os.environ.update(cpu_environment())
    try:
        done = run_python(CODE)
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert done.code == 0, done.stderr[-2000:]
    return tuple(json.loads(done.stdout.splitlines()[-1]))
