"""What goes wrong between here and an object store, in words that say what to do, without credentials."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator

from msconv_runtime.errors import MsconvError, UsageError

from .remote import Cancelled
from .urls import scheme_of

RETRIES = 5  # in a row
FIRST_WAIT_S = 0.5  # then doubled
TRANSIENT = (408, 429, 500, 502, 503, 504)
THROTTLED = ("SlowDown", "Throttling", "RequestLimitExceeded", "TooManyRequests")
RESUMES = "Run the same command again: it resumes."
# Classes by name: the drivers that they belong to may be any, or not installed.
CONNECTION = {
    "ConnectionError",
    "HTTPClientError",
    "ClientConnectionError",
    "ClientPayloadError",
    "IncompleteReadError",
    "ResponseParserError",
    "ResponseStreamingError",
    "FSTimeoutError",
    "TimeoutError",
    "ShortRead",
}
CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "DefaultCredentialsError",
}
HINTS = {
    "s3": "Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_ENDPOINT_URL for a store of your "
    "own); FSSPEC_S3_ANON=true for a public bucket.",
    "gs": "Run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS.",
}
SECRET = re.compile(r"KEY|SECRET|TOKEN|PASSWORD", re.IGNORECASE)


class StoreError(MsconvError):
    """The store refused, failed or could not be reached.  What was transferred is kept."""

    code = "store"


class ShortRead(Exception):
    """A store sent fewer or more bytes than it was asked for."""


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        yield at
        at = at.__cause__ or at.__context__


def _names(error: BaseException) -> set[str]:
    return {c.__name__ for e in _chain(error) for c in type(e).__mro__}


def status_of(error: BaseException) -> tuple[int, str]:
    """(HTTP status, the store's own code), 0 and "" where they are not known."""
    for e in _chain(error):
        response = getattr(e, "response", None)
        if isinstance(response, dict):
            meta, said = response.get("ResponseMetadata", {}), response.get("Error", {})
            return int(meta.get("HTTPStatusCode", 0) or 0), str(said.get("Code", ""))
        code = getattr(e, "code", None) if type(e).__name__ == "HttpError" else None  # of gcsfs
        status = getattr(e, "status", None) or getattr(e, "status_code", None) or code
        if isinstance(status, int) and 300 <= status < 600:
            return status, ""
    return 0, ""


def is_transient(error: BaseException) -> bool:
    """Whether asking again may help."""
    if isinstance(error, FileNotFoundError | PermissionError | MsconvError):
        return False
    status, code = status_of(error)
    if status or code:
        return status in TRANSIENT or code in (*THROTTLED, "InternalError", "RequestTimeout", "ServiceUnavailable")
    return bool(_names(error) & CONNECTION)


class Patience:
    """How often a store is asked again: waits double."""

    def __init__(self, cancelled: threading.Event) -> None:
        self._cancelled = cancelled
        self._tries = 0

    def wait(self, error: Exception) -> None:
        """Before the next try.  Raises `error` if there is none, Cancelled."""
        wait_s = FIRST_WAIT_S * 2**self._tries
        self._tries += 1
        if not is_transient(error) or self._tries > RETRIES:
            raise error
        if self._cancelled.wait(wait_s):
            raise Cancelled


def explain(error: Exception, where: str, writing: bool = False) -> MsconvError:
    """The error for people.  `where`: the address of the file or directory."""
    if isinstance(error, MsconvError):
        return error
    status, code = status_of(error)
    names = _names(error)
    said = f" ({code or f'HTTP {status}'})" if code or status else ""
    give = HINTS.get(scheme_of(where), "The driver finds credentials itself: see its documentation.")
    verb = "write to" if writing else "read"
    if names & CREDENTIALS:
        return StoreError(f"{where}: no credentials were found.", give)
    if code == "NoSuchBucket":
        return UsageError(f"{where}: there is no such bucket{said}.", "Check its name and the store's address.")
    if isinstance(error, PermissionError) or status in (401, 403):
        return StoreError(f"{where}: the store does not allow to {verb} it{said}.", f"Check the rights.  {give}")
    if isinstance(error, FileNotFoundError) or status == 404:
        return UsageError(f"{where}: is not there{said}.", "Check the name; a store's names have capitals.")
    if code in THROTTLED or status == 429:
        return StoreError(
            f"{where}: the store says there were too many requests{said}.", f"Wait a while.  {RESUMES}"
        )
    if status >= 500:
        return StoreError(
            f"{where}: the store failed, {RETRIES} times in a row{said}.", f"Wait a while.  {RESUMES}"
        )
    text = f"{type(error).__name__}: {_scrubbed(str(error))}"
    if names & CONNECTION:
        return StoreError(f"{where}: the connection failed: {text}.", f"Check the network.  {RESUMES}")
    return StoreError(f"{where}: cannot be {'written' if writing else 'read'}{said}: {text}.", RESUMES)


def _scrubbed(text: str) -> str:
    """At most a line of what a driver says, without any value that the environment keeps as a secret."""
    for name, value in os.environ.items():
        if len(value) > 5 and SECRET.search(name):
            text = text.replace(value, "***")
    return re.sub(r"//[^/@\s]+@", "//", " ".join(text.split()))[:200].rstrip(".")
