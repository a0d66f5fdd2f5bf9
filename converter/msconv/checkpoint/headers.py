"""Safetensors headers, read as if an enemy wrote them: bounded, typed, every offset checked.

Format: 8 bytes little-endian header length, that much JSON, then the data
(https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import reprlib
import struct
from pathlib import Path

from msconv_runtime.artifact import digest_bytes
from msconv_runtime.dtypes import BY_CODE
from msconv_runtime.errors import CheckpointError

from ..layout.model import TensorInfo
from ..layout.names import shorten
from .unsupported import refuse_elements

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 16 << 20  # 92,000 tensors need 10 MB
MAX_JSON_ITEMS = 1_200_000  # they have 830,000 braces, brackets and commas; this many take 240 MB to parse
MAX_DIMS = 8


def read_header(path: Path) -> tuple[list[TensorInfo], str]:
    """Tensors of one file in offset order, and the digest of its header.  Raises CheckpointError."""
    try:
        with path.open("rb") as f:
            size = path.stat().st_size
            prefix = f.read(PREFIX_BYTES)
            length = header_length(prefix, path, size)
            data = f.read(length)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror}.", _AGAIN) from None
    if len(data) < length:
        raise CheckpointError(f"{path}: the file ended inside its header.", _AGAIN)
    return parse_header(prefix + data, path, size)


def header_length(prefix: bytes, path: Path, size: int) -> int:
    """Bytes of JSON that the first PREFIX_BYTES of a file of `size` bytes announce.  Raises CheckpointError."""
    if len(prefix) < PREFIX_BYTES:
        raise CheckpointError(f"{path}: {size} bytes is too short for a safetensors file.", _AGAIN)
    (length,) = struct.unpack("<Q", prefix)
    assert isinstance(length, int)
    if length > size - PREFIX_BYTES:
        raise CheckpointError(
            f"{path}: the header claims {length} bytes, the file has {size - PREFIX_BYTES} after its length.",
            _AGAIN,
        )
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: a header of {length} bytes is over the limit of {MAX_HEADER_BYTES}.")
    return length


def parse_header(data: bytes, path: Path, size: int) -> tuple[list[TensorInfo], str]:
    """The same from a file's first bytes, length and JSON, wherever they were read.  Raises CheckpointError."""
    return _tensors(_parse(data[PREFIX_BYTES:], path), path, len(data), size), digest_bytes(data)


_AGAIN = "Download this file again."


def parse_json(data: bytes, where: str) -> object:
    """JSON without duplicate keys.  Raises CheckpointError for anything that is not."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        out = dict(pairs)
        if len(out) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{where}: the name {shorten(twice)!r} is there twice.", _AGAIN)
        return out

    if sum(data.count(c) for c in (b"{", b"[", b",")) > MAX_JSON_ITEMS:
        raise CheckpointError(f"{where}: has too many parts for what it should be.", _AGAIN)
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=_no_constant)
    except UnicodeDecodeError as e:
        raise CheckpointError(f"{where}: not UTF-8 at byte {e.start}.", _AGAIN) from None
    except RecursionError:
        raise CheckpointError(f"{where}: nested too deeply for a header.", _AGAIN) from None
    except ValueError as e:
        raise CheckpointError(f"{where}: not valid JSON: {str(e)[:200]}.", _AGAIN) from None


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is not JSON")


def _parse(data: bytes, path: Path) -> dict[str, object]:
    header = parse_json(data, f"{path}: header")
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object.", _AGAIN)
    header.pop("__metadata__", None)
    return header


def _tensors(header: dict[str, object], path: Path, base: int, size: int) -> list[TensorInfo]:
    out: list[TensorInfo] = []
    for name, entry in header.items():
        out.append(_tensor(name, entry, path, base))
    out.sort(key=lambda t: (t.offset, t.nbytes))
    end = base
    for t in out:
        if t.offset < end:
            raise CheckpointError(
                f"{path}: {shorten(t.name)} begins at byte {t.offset}, inside the tensor before it "
                f"(which ends at {end}).",
                _AGAIN,
            )
        if t.offset > end:
            raise CheckpointError(f"{path}: bytes {end} to {t.offset} belong to no tensor.", _AGAIN)
        end = t.offset + t.nbytes
    if end > size:
        raise CheckpointError(
            f"{path}: truncated: the header describes {end} bytes, the file has {size} "
            f"({end - size} are missing).",
            _AGAIN,
        )
    if end < size:
        raise CheckpointError(f"{path}: {size - end} bytes after the last tensor belong to none.", _AGAIN)
    return out


def _tensor(name: str, entry: object, path: Path, base: int) -> TensorInfo:
    def bad(why: str) -> CheckpointError:
        return CheckpointError(f"{path}: {shorten(name)}: {why}.", _AGAIN)

    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise bad("the name is not valid Unicode") from None
    if not name or len(name) > 1024:
        raise bad(f"a name of {len(name)} characters is not allowed")
    if not isinstance(entry, dict):
        raise bad("its entry is not an object")
    code, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if isinstance(code, str):
        refuse_elements(str(path), name, code)
    if not isinstance(code, str) or code not in BY_CODE:
        raise bad(f"unknown element type {shorten(reprlib.repr(code))}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_is_size(n) for n in shape):
        raise bad(f"shape {shorten(reprlib.repr(shape))} is not a list of up to {MAX_DIMS} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise bad(f"data_offsets {shorten(reprlib.repr(offsets))} are not two positions")
    begin, end = offsets
    nbytes = BY_CODE[code].nbytes
    for n in shape:
        nbytes *= n
    if end - begin != nbytes:
        raise bad(f"data_offsets span {end - begin} bytes, {code} {shape} needs {nbytes}")
    return TensorInfo(name, BY_CODE[code].name, tuple(shape), path.name, base + begin, nbytes)


def _is_size(n: object) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 62
