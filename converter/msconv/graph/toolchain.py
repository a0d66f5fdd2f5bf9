"""MindSpore, and whatever else writes graphs, as far as one must know of it before it is imported."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from msconv_runtime.errors import EnvironmentProblem
from msconv_runtime.targets import MINDIR, Form

DUMPS = "mindspore"  # in an artifact's own directory of state: what MindSpore writes about what fails
DUMP_PLACE = "MS_OM_PATH"  # MindSpore's variable


@contextmanager
def dumps_in(place: Path) -> Iterator[None]:
    """What MindSpore writes of a graph that it cannot compile goes to `place`, not to where the user stands.  What
    an earlier failure left there is removed."""
    before = os.environ.get(DUMP_PLACE)
    shutil.rmtree(place, ignore_errors=True)
    os.environ[DUMP_PLACE] = str(place.absolute())
    try:
        yield
    finally:
        os.environ.pop(DUMP_PLACE)
        if before is not None:
            os.environ[DUMP_PLACE] = before


def mindspore_version() -> str:
    """Raises EnvironmentProblem if mindspore is not installed."""
    return require(MINDIR)


def require(form: Form) -> str:
    """The version of the package that writes and runs graphs of this form.  Raises EnvironmentProblem if it is not
    installed."""
    try:
        return str(import_module(form.package).__version__)
    except ImportError as e:
        raise EnvironmentProblem(
            f"{form.package} cannot be imported ({e}).", f'Install it: pip install "msconv[{form.extra}]".'
        ) from None
