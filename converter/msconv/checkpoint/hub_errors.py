"""What goes wrong between here and a hub, in words that say what to do.  Asks the hub only for near names."""

from __future__ import annotations

import difflib
import errno
from pathlib import Path
from typing import Literal

from huggingface_hub import constants, get_session, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from msconv_runtime.errors import CheckpointError, MsconvError, ResourceError, UsageError

from ..layout.names import shorten
from .http import http

RESUMES = "Run the same command again: what was transferred is kept."
TOKEN = "set HF_TOKEN or run `hf auth login`"
SEARCH_TIMEOUT_S = 5

Purpose = Literal["convert", "pull", "push"]

KNOWN = (
    *(f"Qwen/Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B", "30B-A3B", "235B-A22B")),
    *(f"Qwen/Qwen3-{name}-Instruct-2507" for name in ("4B", "30B-A3B", "235B-A22B")),
    *(f"deepseek-ai/DeepSeek-{name}" for name in ("V3", "V3-0324", "V3.1", "R1", "R1-0528")),
    *(f"moonshotai/{name}" for name in ("Kimi-K2-Instruct", "Moonlight-16B-A3B")),
)


class HubError(MsconvError):
    """The hub refused, failed or could not be reached.  What was transferred is kept."""

    code = "hub"


def explain(error: Exception, repository: str, what: str = "", purpose: Purpose = "convert") -> MsconvError:
    """The error for people.  `repository`: owner/name, with @revision if one was asked for; `what`: the file;
    `purpose`: the command, for what it needs."""
    where = f"{repository}: {what}" if what else repository
    if isinstance(error, MsconvError):
        return error
    if isinstance(error, OfflineModeIsEnabled) and purpose != "convert":
        return HubError(f"{where}: HF_HUB_OFFLINE forbids to {purpose} it.", "Unset HF_HUB_OFFLINE.")
    if isinstance(error, OfflineModeIsEnabled):
        return HubError(
            f"{where}: not in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE forbids to download it.",
            "Unset HF_HUB_OFFLINE, or point HF_HOME at the cache that has it.",
        )
    if isinstance(error, HFValidationError):
        return UsageError(f"{where}: is no name of a model: {str(error)[:200]}", "Give owner/name or a directory.")
    if isinstance(error, HfHubHTTPError):
        return _explain_status(error, repository, where, purpose)
    if isinstance(error, http.TooManyRedirects):
        return HubError(
            f"{where}: {constants.ENDPOINT} redirects in a circle.", "Check HF_ENDPOINT and the proxy's settings."
        )
    if isinstance(error, http.TimeoutException):
        return HubError(
            f"{where}: {constants.ENDPOINT} was silent for {constants.HF_HUB_DOWNLOAD_TIMEOUT} s, or nearly so "
            "for longer, several times.",
            f"{RESUMES}  HF_HUB_DOWNLOAD_TIMEOUT sets how long it may be silent.",
        )
    if isinstance(error, http.HTTPError | ConnectionError):  # the second: of Xet's client
        return HubError(
            f"{where}: the connection to {constants.ENDPOINT} failed: {str(error)[:200] or type(error).__name__}.",
            f"Check the network and HF_ENDPOINT.  {RESUMES}",
        )
    if isinstance(error, OSError):
        return _explain_disk(error, where)
    return HubError(f"{where}: {type(error).__name__}: {str(error)[:300]}", RESUMES)


def _explain_status(error: HfHubHTTPError, repository: str, where: str, purpose: Purpose) -> MsconvError:
    status = error.response.status_code
    name = repository.partition("@")[0]
    has_token = get_token() is not None
    if isinstance(error, GatedRepoError):
        return HubError(
            f"{where}: gated: its licence must be accepted first (HTTP {status}"
            + ("; this token's account did not, or was not let in)." if has_token else "; no token was given)."),
            f"Accept it at {constants.ENDPOINT}/{name}" + ("." if has_token else f", then {TOKEN}."),
        )
    if isinstance(error, RevisionNotFoundError):
        return UsageError(
            f"{where}: has no such revision (HTTP {status}).",
            f"Branches, tags and commits are listed at {constants.ENDPOINT}/{name}/commits/main.",
        )
    if isinstance(error, RepositoryNotFoundError):
        near = near_names(name)
        return UsageError(
            f"{where}: {constants.ENDPOINT} has no such model, or it is private (HTTP {status})"
            + ("; there is no such directory either." if purpose == "convert" else "."),
            (f"Did you mean {' or '.join(near)}?  " if near else "")
            + f"If it is private, {'check the rights of your token' if has_token else TOKEN}.",
        )
    if isinstance(error, RemoteEntryNotFoundError):
        return CheckpointError(
            f"{where}: is not in the repository, though its list of files has it (HTTP {status}).",
            "Give another @revision, or tell the owner of the repository.",
        )
    if status == 401:
        given = "refused the token" if has_token else "wants a token"
        return HubError(f"{where}: {constants.ENDPOINT} {given} (HTTP 401).", f"To give one, {TOKEN}.")
    if status == 403:
        return HubError(
            f"{where}: {constants.ENDPOINT} does not allow it (HTTP 403).",
            f"Check that your token may {'write to' if purpose == 'push' else 'read'} {name}"
            + ("." if has_token else f"; to give one, {TOKEN}."),
        )
    if status == 429:
        asked = error.response.headers.get("Retry-After", "")
        wait = f" and asks to wait {asked} s" if asked.isdigit() else ""
        return HubError(
            f"{where}: {constants.ENDPOINT} says there were too many requests (HTTP 429){wait}.",
            f"{RESUMES}  With a token (HF_TOKEN) more is allowed.",
        )
    if status >= 500:
        return HubError(
            f"{where}: {constants.ENDPOINT} failed, several times (HTTP {status}).", f"Wait a while.  {RESUMES}"
        )
    said = f": {shorten(error.server_message)}" if error.server_message else ""
    return HubError(f"{where}: {constants.ENDPOINT} answered HTTP {status}{said}.", "Check HF_ENDPOINT.")


def _explain_disk(error: OSError, where: str) -> ResourceError:
    place = error.filename or constants.HF_HUB_CACHE
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(
            f"{where}: not enough disk for the download in {Path(place).parent}.",
            f"Free some, or point HF_HOME at a larger disk.  {RESUMES}",
        )
    if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):
        return ResourceError(
            f"{place}: its file system gives no locks ({error.strerror}).",
            "Point HF_HOME at a directory on another file system, or mount this one with locks.",
        )
    return ResourceError(
        f"{place}: cannot be written: {error.strerror}.", "Point HF_HOME at a writable directory."
    )


def near_names(name: str) -> list[str]:
    """Up to three models that may have been meant: of those we know, then of what the hub finds.  Never raises."""
    last = name.rsplit("/", 1)[-1]
    known = {k.casefold(): k for k in KNOWN} | {k.rsplit("/", 1)[-1].casefold(): k for k in KNOWN}
    near = difflib.get_close_matches(name.casefold(), known, 3, 0.7)
    near += difflib.get_close_matches(last.casefold(), known, 3, 0.7)
    found = [known[n] for n in near]
    if len(found) < 3:
        found += _search(last)
    return list(dict.fromkeys(found))[:3]


def _search(name: str) -> list[str]:
    try:
        answer = get_session().get(
            f"{constants.ENDPOINT}/api/models", params={"search": name, "limit": 3}, timeout=SEARCH_TIMEOUT_S
        )
        return [shorten(model["id"]) for model in answer.raise_for_status().json()[:3]]
    except Exception:  # only a help
        return []
