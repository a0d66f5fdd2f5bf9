"""Rows and columns of a block for one rank, in its order and type."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from msconv_runtime.dtypes import DTYPES
from msconv_runtime.errors import CheckpointError

from ..layout.cuts import Box
from .buffers import Buffers
from .rank_parts import RankPart


def cut_rows(
    block: NDArray[np.uint8],
    dtype: str,
    cols: int,
    first: int,
    box: Box,
    part: RankPart,
    buffers: Buffers,
    name: str,
) -> NDArray[np.uint8] | None:
    """Rows and columns of the block that are in the box, in the part's type, as contiguous bytes; None if no
    row is.  `first`: the block's first row in the source, which has `cols` columns."""
    pitch = cols * DTYPES[dtype].nbytes
    top, bottom = max(first, box.row) - first, min(first + len(block) // pitch, box.row + box.rows) - first
    if top >= bottom:
        return None
    if dtype != part.dtype:
        values = block.view(DTYPES[dtype].numpy).reshape(-1, cols)[top:bottom, box.col : box.col + box.cols]
        size = values.size * DTYPES[part.dtype].nbytes
        out = buffers.cut[:size].view(DTYPES[part.dtype].numpy).reshape(values.shape)
        cast(_ordered(values, part.order), out, name)
        return buffers.cut[:size]
    if box.cols == cols and part.order is None:
        return block[top * pitch : bottom * pitch]
    item = DTYPES[dtype].nbytes
    word = next(w for w in (8, 4, 2, 1) if not (pitch % w or box.col * item % w or box.cols * item % w))
    view = block.view(f"u{word}").reshape(-1, pitch // word)
    left, width = box.col * item // word, box.cols * item // word
    size = (bottom - top) * width
    words = buffers.cut[: size * word].view(f"u{word}").reshape(bottom - top, width)
    np.copyto(words, _ordered(view[top:bottom, left : left + width], part.order))
    return buffers.cut[: size * word]


def _ordered(rows: NDArray[Any], order: NDArray[np.intp] | None) -> NDArray[Any]:
    """Whole heads with their rows in another order."""
    if order is None:
        return rows
    return rows.reshape(-1, len(order), rows.shape[1])[:, order].reshape(rows.shape)


def cast(values: NDArray[Any], out: NDArray[Any], name: str) -> None:
    """Raises CheckpointError if float16 cannot hold a number.  Of int64 -> float32 the bits are taken, not the
    numbers: so ModelSlim writes scales for float16 models."""
    if values.dtype == np.int64 and out.dtype == np.float32:
        if (values >> 32).any():
            raise CheckpointError(
                f"{name}: int64 that should hold the bits of float32 in its lower half has others above them.",
                "Download the file that holds it again, or quantise the model again.",
            )
        np.copyto(out.view(np.uint32), values.astype(np.uint32))
        return
    if values.dtype == np.int64 and out.dtype == np.int32 and (values != values.astype(np.int32)).any():
        raise CheckpointError(f"{name}: has numbers beyond 32 bits: no tokens are so many.", "Download it again.")
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(out, values, casting="unsafe")
    if out.dtype == np.float16 and (lost := int(np.isinf(out).sum()) - int(np.isinf(values).sum())):
        raise too_large(name, lost, "float16")


def beyond(dtype: str) -> str:
    return f"values are beyond {dtype}'s range (largest {DTYPES[dtype].largest})"


def too_large(name: str, lost: int, dtype: str) -> CheckpointError:
    return CheckpointError(
        f"{name}: {lost} {beyond(dtype)}.",
        "Convert with --dtype bfloat16 or float32." if dtype == "float16" else "Its scales cannot be right.",
    )
