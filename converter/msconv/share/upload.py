"""An artifact goes to an object store: the largest files first, READY last, each found right before it counts.

The store is its own journal.  A file that is there with the bytes' digest is not sent again, nor is a part of an
upload that was begun; what was not ended is no object, and nobody reads half of one.
"""

from __future__ import annotations

import base64
import hashlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msconv_runtime.artifact import MANIFEST, READY, SIGNATURE, Manifest, digest_bytes
from msconv_runtime.errors import ArtifactError, MsconvError, UsageError

from ..checkpoint.concurrency import each
from ..checkpoint.directory import AUXILIARY
from ..checkpoint.remote import Progress
from ..checkpoint.store import filesystem, patiently
from ..checkpoint.store_errors import StoreError
from ..workspace.names import IDENTITY, REPORT
from ..workspace.state import SOURCE
from .parts import CARD, is_part, parts

PART_BYTES = 16 << 20
MOST_PARTS = 9000  # a store takes 10,000
AT_ONCE = 3  # parts, each in memory
LAST = (MANIFEST, READY)
OURS = (*AUXILIARY, SIGNATURE, REPORT, CARD, SOURCE, IDENTITY, *LAST)
PROBE = ".msconv/probe"


@dataclass(frozen=True)
class Uploaded:
    """`nbytes` were sent in this run."""

    url: str
    files: int
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class _Part:
    number: int
    begin: int
    nbytes: int


class Bucket:
    """The objects below one address."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.bucket, _, prefix = url.removeprefix("s3://").partition("/")
        if not prefix:
            raise UsageError(f"{url}: is a whole bucket.", f"Give a directory in it: {url}/NAME.")
        self.prefix = prefix + "/"
        self._cancelled = threading.Event()

    def call(self, method: str, name: str, **values: Any) -> dict[str, Any]:
        """One of S3's own calls, asked again where that may help.  Raises MsconvError, Cancelled."""
        return self._asked(method, f"{self.url}/{name}", Key=self.prefix + name, **values)

    def _asked(self, method: str, where: str, **values: Any) -> dict[str, Any]:
        def ask() -> dict[str, Any]:
            found: dict[str, Any] = filesystem("s3").call_s3(method, Bucket=self.bucket, **values)
            return found

        return patiently(ask, where, self._cancelled, writing=True)

    def objects(self) -> dict[str, tuple[int, str]]:
        """(bytes, digest) of what is there, by name."""
        found: dict[str, tuple[int, str]] = {}
        token: dict[str, str] = {}
        while True:
            page = self._asked("list_objects_v2", self.url, Prefix=self.prefix, **token)
            for entry in page.get("Contents", ()):
                name = entry["Key"].removeprefix(self.prefix)
                found[name] = (int(entry["Size"]), entry["ETag"].strip('"'))
            if not page.get("IsTruncated"):
                return found
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def begun(self, name: str) -> str:
        """The upload of a file that was begun and not ended, "" if there is none."""
        page = self._asked("list_multipart_uploads", self.url, Prefix=self.prefix + name)
        found = [u["UploadId"] for u in page.get("Uploads") or () if u["Key"] == self.prefix + name]
        return str(found[0]) if found else ""

    def sent_parts(self, name: str, upload: str) -> dict[int, tuple[int, str]]:
        """(bytes, digest) of the parts that are there, by number."""
        found: dict[int, tuple[int, str]] = {}
        marker = 0
        while True:
            page = self.call("list_parts", name, UploadId=upload, PartNumberMarker=marker)
            for entry in page.get("Parts") or ():
                found[entry["PartNumber"]] = (int(entry["Size"]), entry["ETag"].strip('"'))
            if not page.get("IsTruncated"):
                return found
            marker = int(page["NextPartNumberMarker"])

    def read_small(self, name: str) -> bytes:
        """A small file, b"" if it is not there.  Raises MsconvError, Cancelled."""
        address = f"{self.url}/{name}"

        def ask() -> bytes:
            try:
                return bytes(filesystem("s3").cat_file(address))
            except FileNotFoundError:
                return b""

        return patiently(ask, address, self._cancelled)

    def delete(self, name: str) -> None:
        self.call("delete_object", name)

    def stop(self) -> None:
        self._cancelled.set()


def is_uploaded(url: str, identity: str, force: bool) -> bool:
    """Before anything is moved: whether the artifact of this conversion is there already, whole.
    Raises MsconvError if it may not be put there."""
    bucket = Bucket(url)
    objects = bucket.objects()
    foreign = [name for name in objects if name not in OURS and not is_part(name)]
    if foreign:
        raise UsageError(
            f"{url}: holds something else than an artifact ({', '.join(foreign[:3])}); nothing was touched.",
            "Give an empty or new place with --output.",
        )
    started = bucket.call("create_multipart_upload", PROBE)["UploadId"]  # leaves nothing that could be seen
    bucket.call("abort_multipart_upload", PROBE, UploadId=started)
    if READY not in objects or force:
        return False
    if bucket.read_small(IDENTITY).decode("ascii", "replace") != identity:
        raise _another(url)
    return bucket.read_small(READY).decode("ascii", "replace").split() == [
        digest_bytes(bucket.read_small(MANIFEST))
    ]


def _another(url: str) -> ArtifactError:
    return ArtifactError(
        f"{url}: holds another artifact (the source, the layout, --dtype or msconv changed).",
        "Give another --output, or replace it with --force.",
    )


def upload(root: Path, manifest: Manifest, url: str, force: bool, progress: Progress = lambda n: None) -> Uploaded:
    """Upload an artifact that is READY here.  `progress` gets bytes, of weights and graphs alone, as they are
    found to be there.  Raises MsconvError; what was sent is used by the next run."""
    started = time.monotonic()
    bucket = Bucket(url)
    objects = bucket.objects()
    large = parts(manifest)
    small = [n for n in OURS if n not in LAST and (root / n).is_file()]
    if READY in objects and bucket.read_small(MANIFEST) != (root / MANIFEST).read_bytes():
        if not force:
            raise _another(url)
        for name in (READY, MANIFEST):  # first: nothing that is half one, half the other looks whole
            bucket.delete(name)
    sent = 0
    for name in (*large, *small, *LAST):
        path = root / name
        found = None if name == READY else objects.get(name)
        sent += _file(bucket, name, path, found, progress if name in large else lambda n: None)
    for name in objects.keys() - {*large, *small, *LAST}:
        bucket.delete(name)  # of the artifact that was replaced
    return Uploaded(url, len(large) + len(small) + len(LAST), sent, time.monotonic() - started)


def _file(bucket: Bucket, name: str, path: Path, found: tuple[int, str] | None, progress: Progress) -> int:
    """Bring one file there.  Returns the bytes that were sent."""
    size = path.stat().st_size
    if size <= PART_BYTES:
        data = path.read_bytes()
        digest = _md5(data)
        if found == (size, digest):
            progress(size)
            return 0
        bucket.call("put_object", name, Body=data, ContentMD5=_base64(digest))
        _check(bucket, name, path, digest)
        progress(size)
        return size
    cut = _cut(size)
    is_like = found is not None and found[0] == size and found[1].endswith(f"-{len(cut)}")
    if is_like and found == (size, _joined([_md5(data) for data in _read(path, cut)])):
        progress(size)
        return 0
    return _in_parts(bucket, name, path, cut, progress)


def _in_parts(bucket: Bucket, name: str, path: Path, cut: list[_Part], progress: Progress) -> int:
    """Send a file part by part, those left out that are there, and end the upload."""
    upload = bucket.begun(name)
    there = bucket.sent_parts(name, upload) if upload else {}
    if not upload:
        upload = bucket.call("create_multipart_upload", name, ContentType="application/octet-stream")["UploadId"]
    lock, sent = threading.Lock(), 0

    def send(part: _Part) -> tuple[str, str]:
        nonlocal sent
        (data,) = _read(path, [part])
        digest = _md5(data)
        etag = digest
        if there.get(part.number) != (part.nbytes, digest):
            values = {"UploadId": upload, "PartNumber": part.number, "ContentMD5": _base64(digest)}
            etag = bucket.call("upload_part", name, Body=data, **values)["ETag"].strip('"')
            with lock:
                sent += part.nbytes
        progress(part.nbytes)
        return etag, digest

    answers = each(cut, send, bucket.stop, AT_ONCE)
    listed = [{"PartNumber": p.number, "ETag": f'"{etag}"'} for p, (etag, _) in zip(cut, answers, strict=True)]
    expected = _joined([digest for _, digest in answers])
    try:
        bucket.call("complete_multipart_upload", name, UploadId=upload, MultipartUpload={"Parts": listed})
    except MsconvError:  # the answer may have been lost, and not the upload
        if bucket.objects().get(name) != (path.stat().st_size, expected):
            raise
    _check(bucket, name, path, expected)
    return sent


def _check(bucket: Bucket, name: str, path: Path, expected: str) -> None:
    """Raises StoreError if the store has other bytes: by its digest, or by reading them back where that is
    another kind of digest (a store that encrypts with keys of its own)."""
    head = bucket.call("head_object", name)
    size, etag = path.stat().st_size, head["ETag"].strip('"')
    if int(head["ContentLength"]) == size and (etag == expected or _reads_back(bucket, name, path)):
        return
    bucket.delete(name)
    raise StoreError(
        f"{bucket.url}/{name}: the store has other bytes than were sent ({head['ContentLength']} of {size} bytes, "
        f"digest {etag} instead of {expected}); it was deleted.",
        "Run the same command again; if that comes again, the store or the way to it damages data.",
    )


def _reads_back(bucket: Bucket, name: str, path: Path) -> bool:
    for part, data in zip(_cut(path.stat().st_size), _read(path, _cut(path.stat().st_size)), strict=True):
        end = part.begin + part.nbytes

        def ask(begin: int = part.begin, end: int = end) -> bytes:
            return bytes(filesystem("s3").cat_file(f"{bucket.url}/{name}", start=begin, end=end))

        if patiently(ask, f"{bucket.url}/{name}", threading.Event()) != data:
            return False
    return True


def _cut(size: int) -> list[_Part]:
    step = max(PART_BYTES, -(-size // MOST_PARTS))
    return [_Part(i + 1, at, min(step, size - at)) for i, at in enumerate(range(0, size, step))]


def _read(path: Path, cut: list[_Part]) -> Iterator[bytes]:
    with path.open("rb") as f:
        for part in cut:
            f.seek(part.begin)
            yield f.read(part.nbytes)


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _joined(digests: list[str]) -> str:
    """The digest of an object that was sent in parts."""
    return f"{_md5(b''.join(map(bytes.fromhex, digests)))}-{len(digests)}"


def _base64(digest: str) -> str:
    return base64.b64encode(bytes.fromhex(digest)).decode()
