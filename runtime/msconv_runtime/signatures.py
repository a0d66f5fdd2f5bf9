"""Signatures of artifacts: OpenSSF Model Signing with an elliptic-curve key, offline, in `model.sig`.

Signed is the SHA-256 of each file that a command or a server reads: manifest, weights, graphs, and what the model
has besides.  The package model-signing hashes, signs and compares; it is imported when it is asked for.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .artifact import MANIFEST, READY, SIGNATURE, STATE_DIR, replace_file
from .artifact.directory import MAX_MANIFEST_BYTES
from .artifact.files import read_file
from .errors import ArtifactError, EnvironmentProblem, UsageError

MOST_BYTES = 64 << 20  # of a signature: some 200 a file
UNSIGNED_FILES = (READY, SIGNATURE, "report.html", "README.md", ".gitattributes", ".gitignore")
UNSIGNED = (*UNSIGNED_FILES, STATE_DIR, ".git")  # no server reads them, and READY follows from MANIFEST
EXTRA = "pip install 'msconv[sign]'"
AGAIN = "`msconv sign ARTIFACT --key KEY` signs it as it is now."
SOME = 20  # places that a message names


def sign(root: Path, names: Iterable[str], key: Path) -> None:
    """Write `model.sig` over the files of these names, by the private key in the PEM file `key`.

    Raises EnvironmentProblem without the package, UsageError for a key that it cannot use, ArtifactError for files
    that cannot be signed."""
    signer = _library("signing").Config()
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        signer.use_elliptic_key_signer(private_key=key)
    except (OSError, ValueError, TypeError, AttributeError, UnsupportedAlgorithm) as e:
        raise _unfit(key, "private", e) from None
    draft = root / STATE_DIR / SIGNATURE
    try:
        draft.parent.mkdir(exist_ok=True)
        hashing = _hashing([root / name for name in names]).set_ignored_paths(paths=UNSIGNED)
        signer.set_hashing_config(hashing).sign(root, draft)
    except ValueError as e:
        raise ArtifactError(f"{root}: cannot be signed: {e}", "Put a copy in place of what is no file.") from None
    replace_file(root / SIGNATURE, draft.read_bytes())
    draft.unlink()


def refuse_unsigned(root: Path, key: Path) -> None:
    """Raises ArtifactError unless the directory holds the files that were signed by the owner of the public key in
    the PEM file `key`, the same bytes, and no others.  Reads every byte; nothing in it is parsed but `model.sig`.

    Raises EnvironmentProblem without the package, UsageError for a key that it cannot use."""
    verifier, data = _verifier(key), _read(root)
    from cryptography.exceptions import InvalidSignature

    hashing = _hashing(list(_files(root)))
    _refuse_other_key(root, data, key)
    try:
        verifier.set_hashing_config(hashing).verify(root, root / SIGNATURE)
    except InvalidSignature:
        raise ArtifactError(
            f"{root}: {SIGNATURE} was changed after it was signed, or is not by {key}.", "Take it from its author."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as e:
        if found := _differences(_signed(data), hashing.found):
            lines = "\n".join(f"  {line}" for line in found[:SOME])
            raise ArtifactError(
                f"{root}: {len(found)} files are not those that were signed:\n{lines}", _why(found)
            ) from None
        raise ArtifactError(f"{root}: {SIGNATURE} cannot be checked: {str(e)[:300]}", AGAIN) from None
    except OSError as e:
        raise ArtifactError(f"{e.filename or root}: cannot be read: {e.strerror}.") from None


def refuse_other_manifest(where: str, data: bytes, manifest: bytes, key: Path) -> None:
    """Raises ArtifactError if a signature names another key, or another manifest, as its own: before a download,
    which `refuse_unsigned` must follow."""
    _verifier(key)
    _refuse_other_key(where, data, key)
    if _signed(data).get(MANIFEST) != hashlib.sha256(manifest).hexdigest():
        raise ArtifactError(f"{where}: {SIGNATURE} was made for another {MANIFEST}.", "Sign and push it again.")


def described(root: Path) -> dict[str, Any] | None:
    """What an artifact's signature says of itself: the SHA-256 of its key, and whether it is for another manifest
    than this.  None: there is no signature.  Proves nothing, needs no package."""
    try:
        data = read_file(root / SIGNATURE, MOST_BYTES)
        manifest = hashlib.sha256(read_file(root / MANIFEST, MAX_MANIFEST_BYTES)).hexdigest()
    except (OSError, ArtifactError):
        return None
    return {"key": _key_of(data), "stale": _signed(data).get(MANIFEST) != manifest}


def _library(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"model_signing.{module}")
    except ImportError as e:
        raise EnvironmentProblem(f"Signatures need the package model-signing ({e}).", f"`{EXTRA}`") from None


def _hashing(files: list[Path]) -> Any:
    """The package's way to hash a directory, for these files and no others.  `found` has what it hashed."""

    class OnlyThese(_library("hashing").Config):  # type: ignore[misc]
        found: dict[str, str]

        def hash(self, model_path: Any, *, files_to_hash: Any = None) -> Any:
            made = super().hash(model_path, files_to_hash=files)
            self.found = {r.identifier: r.digest.digest_hex for r in made.resource_descriptors()}
            return made

        def add_ignored_paths(self, **paths: Any) -> None:
            """A signature does not say which files are left out."""

    config = OnlyThese()
    config.found = {}
    return config.set_ignored_paths(paths=(), ignore_git_paths=False)


def _files(root: Path) -> Iterator[Path]:
    """All but UNSIGNED; links too, which the package refuses."""
    for directory, below, names in os.walk(root):
        links = [b for b in below if Path(directory, b).is_symlink()]
        if Path(directory) == root:
            below[:] = [b for b in below if b not in UNSIGNED or b in UNSIGNED_FILES]
            names = [n for n in names if n not in UNSIGNED_FILES]
        yield from (Path(directory, name) for name in (*links, *names))


def _verifier(key: Path) -> Any:
    verifier = _library("verifying").Config()
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        return verifier.use_elliptic_key_verifier(public_key=key)
    except (OSError, ValueError, TypeError, AttributeError, UnsupportedAlgorithm) as e:
        raise _unfit(key, "public", e) from None


def _unfit(key: Path, kind: str, error: Exception) -> UsageError:
    why = error.strerror if isinstance(error, OSError) else str(error)[:200]
    make = {
        "private": "`openssl ecparam -name prime256v1 -genkey -noout -out KEY` makes one.",
        "public": "`openssl ec -in KEY -pubout -out KEY.pub` makes it of a private one.",
    }
    what = "elliptic-curve key in PEM (P-256, P-384 or P-521), without a password"
    return UsageError(f"{key}: is no {kind} {what}: {why}.", make[kind])


def _read(root: Path) -> bytes:
    try:
        return read_file(root / SIGNATURE, MOST_BYTES)
    except FileNotFoundError:
        raise ArtifactError(f"{root}: is not signed (no {SIGNATURE}).", AGAIN) from None
    except OSError as e:
        raise ArtifactError(f"{root / SIGNATURE}: cannot be read: {e.strerror}.") from None


def _refuse_other_key(where: Path | str, data: bytes, key: Path) -> None:
    """Raises ArtifactError for a signature that names another key, or none, as the package's first ones did."""
    from cryptography.hazmat.primitives import serialization

    public = serialization.load_pem_public_key(key.read_bytes())
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    if (found := _key_of(data)) != hashlib.sha256(pem).hexdigest():
        by = f"by another key than {key}: its SHA-256 is {found}" if found else "by no key that it names"
        raise ArtifactError(f"{where}: is signed {by}.", "Ask its author for the public key.")


def _key_of(data: bytes) -> str:
    """The SHA-256 of the public key that a signature names, or ""."""
    try:
        hint = json.loads(data)["verificationMaterial"]["publicKey"]["hint"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""
    return hint if isinstance(hint, str) and len(hint) == 64 and hint.isalnum() else ""


def _signed(data: bytes) -> dict[str, str]:
    """Names and SHA-256 that a signature claims to be over; none if it cannot be read."""
    try:
        payload = json.loads(base64.b64decode(json.loads(data)["dsseEnvelope"]["payload"], validate=True))
        return {str(r["name"]): str(r["digest"]) for r in payload["predicate"]["resources"]}
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}


def _differences(signed: dict[str, str], found: dict[str, str]) -> list[str]:
    if not signed or not found:
        return []
    lines = [f"{name}: is not there" for name in sorted(signed.keys() - found.keys())]
    lines += [f"{name}: was not signed" for name in sorted(found.keys() - signed.keys())]
    common = sorted(signed.keys() & found.keys())
    return lines + [f"{name}: other bytes" for name in common if signed[name] != found[name]]


def _why(lines: list[str]) -> str:
    if any(line.startswith(f"{MANIFEST}: ") for line in lines):
        return f"If it was compiled, verified or rehearsed since, that is why: {AGAIN}"
    return "Take the artifact from its author again; what is your own, keep elsewhere."
