"""A deep model's graph is made in a process of its own: what is said when that ends without one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CALL = """
from types import SimpleNamespace
from msconv.steps.exporting import _export_in_a_process
from msconv_runtime.errors import MsconvError

try:
    _export_in_a_process(SimpleNamespace(title="prefill"))
except MsconvError as e:
    print(e.code, e.message, e.hint)
"""
KILLED = "import os\n\nif __name__ == '__mp_main__':\n    os.kill(os.getpid(), 9)\n"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (CALL, "usage prefill: the process that compiles it ended with 1 before it began."),
        (KILLED + CALL, "resource prefill: the process that compiled it was ended, most likely"),
    ],
    ids=["no main guard", "killed"],
)
def test_a_process_that_ends_early_is_named(tmp_path: Path, script: str, said: str) -> None:
    path = tmp_path / "script.py"
    path.write_text(script)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith(said), done.stdout + done.stderr
