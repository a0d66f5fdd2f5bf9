"""What a server's process does before its first import, and what of it ends when SGLang is imported."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import msconv_runtime
from msconv_runtime.sglang import garbage
from msconv_runtime.sglang.environment import STARTUP

RUNTIME = Path(msconv_runtime.__file__).parents[1]
SAY = "import gc, json, sys; print(json.dumps([gc.get_threshold(), getattr(sys, 'from_elsewhere', None)]))"


def started(*path: Path, isolated: bool = False, program: str = "sglang") -> tuple[list[int], str | None, str]:
    """Thresholds of a Python with this PYTHONPATH, what another sitecustomize said, and standard error.
    `program`: a word of its command line."""
    flags = ["-S"] if isolated else []  # without site-packages, by hand: as a Python that has no msconv
    code = "import sitecustomize\n" + SAY if isolated else SAY
    found = subprocess.run(
        [sys.executable, *flags, "-c", code, program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))},
        capture_output=True,
        text=True,
        check=True,
    )
    threshold, elsewhere = json.loads(found.stdout)
    return threshold, elsewhere, found.stderr


def test_searches_are_rare_from_the_start_and_as_usual_after_the_imports() -> None:
    assert started(STARTUP, RUNTIME)[0] == list(garbage.RARELY)
    was = gc.get_threshold()
    try:
        garbage.search_rarely()
        with garbage.no_search():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_threshold() == was
    finally:
        gc.set_threshold(*was)


def test_thresholds_that_somebody_set_stay() -> None:
    was = gc.get_threshold()
    try:
        gc.set_threshold(5_000, 7, 7)
        with garbage.no_search():
            pass
        assert gc.get_threshold() == (5_000, 7, 7)
    finally:
        gc.set_threshold(*was)


def test_no_search_looks_often_at_what_came_in_between() -> None:
    gc.collect()
    with garbage.no_search():
        kept = [[] for _ in range(10_000)]
    assert len(gc.get_objects(generation=0)) < 5_000 <= len(kept)


def test_what_somebody_has_frozen_stays_so() -> None:
    if gc.get_freeze_count():
        pytest.skip("something of this process is frozen already")
    try:
        gc.freeze()
        frozen = gc.get_freeze_count()
        with garbage.no_search():
            pass
        assert gc.get_freeze_count() >= frozen > 0
    finally:
        gc.unfreeze()


def test_another_program_of_a_server_searches_as_ever() -> None:
    assert started(STARTUP, RUNTIME, program="a tool")[0] != list(garbage.RARELY)


def test_two_of_them_are_each_read_once(tmp_path: Path) -> None:
    other, own = tmp_path / "other", tmp_path / "own"
    shutil.copytree(STARTUP, other)
    own.mkdir()
    (own / "sitecustomize.py").write_text("import sys\nsys.from_elsewhere = sys.modules[__name__].__file__\n")
    threshold, elsewhere, said = started(STARTUP, other, own, RUNTIME)
    assert (threshold, elsewhere, said) == (list(garbage.RARELY), str(own / "sitecustomize.py"), "")


def test_the_file_of_the_machine_is_read_as_well(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.from_elsewhere = __name__\n")
    threshold, elsewhere, said = started(STARTUP, tmp_path, RUNTIME)
    assert (threshold, elsewhere, said) == (list(garbage.RARELY), "sitecustomize", "")


@pytest.mark.parametrize("own", [True, False])
def test_a_python_without_msconv_starts_as_ever(own: bool, tmp_path: Path) -> None:
    if own:
        (tmp_path / "sitecustomize.py").write_text("import sys\nsys.from_elsewhere = 'its own'\n")
    threshold, elsewhere, said = started(STARTUP, tmp_path, isolated=True)
    usual, _, _ = started(tmp_path)
    assert (threshold, elsewhere, said) == (usual, "its own" if own else None, "")
