"""What `make test` leaves out to be done in time: the make target of that part sets MSCONV_EVERY_LAYOUT."""

from __future__ import annotations

import os

import pytest

EVERY = bool(os.environ.get("MSCONV_EVERY_LAYOUT"))


def one_of_many(target: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not EVERY, reason=f"one of many: `make {target}` runs it")
