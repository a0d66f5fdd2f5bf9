"""Addresses in object stores and on servers: which are taken, and what an address may not carry."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec

from msconv_runtime.errors import EnvironmentProblem, UsageError

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/{1,2}(?=[^/])")  # a Path keeps only one of the slashes
FORBIDDEN = re.compile(r"[\x00-\x20?#*\[\]{}\\]|::")
MOST_CHARACTERS = 1000

# By scheme: the package that its driver for fsspec is in, "" where fsspec has it itself.
DRIVERS = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "oss": "ossfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "memory": "",
}
IN_EXTRA = ("fsspec", "s3fs", "aiohttp")


@dataclass(frozen=True)
class StoreUrl:
    """Where an artifact shall go that is no directory of this machine."""

    url: str

    def __str__(self) -> str:
        return self.url


def is_url(text: str) -> bool:
    """Whether this is an address and no path."""
    return URL.match(text) is not None


def scheme_of(url: str) -> str:
    """`s3` of s3://bucket/model."""
    return url.partition(":")[0].lower()


def without_secrets(text: str) -> str:
    """The address without user, password and what follows a question mark: for messages."""
    scheme, _, rest = text.partition(":")
    rest = rest.lstrip("/").partition("?")[0].partition("#")[0]
    place, slash, path = rest.partition("/")
    return f"{scheme}://{place.rpartition('@')[2]}{slash}{path}"[:300]


def checked_url(text: str) -> str:
    """The address, written in one way.  Raises UsageError for one that is not taken, or that carries a password or
    a key."""
    match = URL.match(text)
    scheme = scheme_of(text)
    said = without_secrets(text)
    if match is None or scheme not in DRIVERS:
        known = ", ".join(f"{s}://" for s in DRIVERS if s not in ("memory", "gcs", "abfs"))
        raise UsageError(f"{said}: addresses that begin with {scheme}:// are not read.", f"Give one of {known}.")
    rest = text[match.end() :]
    if "@" in rest.partition("/")[0]:
        raise UsageError(
            f"{said}: an address with a user or a password in it is refused: it would be recorded and shown.",
            "Give it without; the driver finds credentials itself (environment, profile, netrc).",
        )
    if FORBIDDEN.search(rest) or len(text) > MOST_CHARACTERS:
        raise UsageError(
            f"{said}: an address with a query (?...), wildcards, spaces or several parts is refused: queries "
            "carry keys, and an address is recorded and shown.",
            "Give the plain address of a directory, as s3://bucket/models/Qwen3-8B.",
        )
    parts = rest.rstrip("/").split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise UsageError(f"{said}: has an empty part, `.` or `..`.", "Give the plain address of a directory.")
    return f"{scheme}://{'/'.join(parts)}"


def require_driver(url: str) -> None:
    """Before the first import of what asks a store.  Raises EnvironmentProblem if a package is missing."""
    scheme = scheme_of(url)
    driver = DRIVERS[scheme]
    for package in filter(None, ("fsspec", driver)):
        if find_spec(package) is None:
            wanted = '"msconv[storage]"' if package in IN_EXTRA else package
            raise EnvironmentProblem(
                f"{url[:300]}: {package} is not installed, which {scheme}:// addresses need.",
                f"Install it: pip install {wanted}, or give a directory of this machine.",
            )
