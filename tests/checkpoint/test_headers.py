"""Safetensors headers as an enemy or a broken download would write them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from msconv.checkpoint.headers import read_header
from msconv_runtime.errors import CheckpointError
from tests.checkpoints import Stored, write_raw, write_safetensors


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refused(path: Path) -> str:
    """The message that refuses `path`: it names the file and is of readable length."""
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = caught.value.message
    assert str(path) in message
    assert len(message) < 600
    assert message.isprintable()
    return message


def described(directory: Path, header: Any, data: bytes = bytes(8)) -> str:
    return refused(write_raw(directory / "x.safetensors", json.dumps(header).encode(), data))


def test_tensors_come_with_their_places(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    values = {
        "a": Stored("F32", np.arange(6, dtype=np.uint32).reshape(2, 3)),
        "b": Stored("BF16", np.arange(4, dtype=np.uint16)),
    }
    write_safetensors(path, values)
    infos, digest = read_header(path)
    data = path.read_bytes()
    assert [(i.name, i.dtype, i.shape, i.nbytes) for i in infos] == [
        ("a", "float32", (2, 3), 24),
        ("b", "bfloat16", (4,), 8),
    ]
    for info in infos:
        assert data[info.offset : info.offset + info.nbytes] == values[info.name].bits.tobytes()
    assert digest.startswith("xxh3:")


def test_empty_and_scalar_tensors_are_allowed(tmp_path: Path) -> None:
    header = {"none": entry(shape=[0, 7], offsets=[0, 0]), "one": entry(shape=[], offsets=[0, 4])}
    infos, _ = read_header(write_raw(tmp_path / "x.safetensors", json.dumps(header).encode(), bytes(4)))
    assert {i.name: i.shape for i in infos} == {"none": (0, 7), "one": ()}


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_shorter_than_its_length_field_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(size))
    assert "too short" in refused(path)


@pytest.mark.parametrize("length", [3, 100, 2**31, 2**63, 2**64 - 1])
def test_a_header_longer_than_its_file_is_refused_before_it_is_read(tmp_path: Path, length: int) -> None:
    path = write_raw(tmp_path / "x.safetensors", b"{}", length=length)
    assert str(length) in refused(path)


def test_a_huge_header_in_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as f:
        f.write(struct.pack("<Q", 1 << 40))
        f.truncate(1 << 41)  # sparse
    assert "limit" in refused(path)


@pytest.mark.parametrize(
    ("header", "word"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"not json", "JSON"),
        (b"[]", "object"),
        (b'"text"', "object"),
        (b"null", "object"),
        (b'{"a": NaN}', "JSON"),
        (b'{"a\xff": {}}', "UTF-8"),
        (b"\xff\xfe{}", "UTF-8"),
        (b"[" * 100_000 + b"]" * 100_000, "nested"),
        (b'{"a": ' + b"9" * 5000 + b"}", "JSON"),
        (b'{"a": 1}', "object"),
        (b'{"a": null}', "object"),
        (b'{"a": {}}', "element type"),
    ],
)
def test_a_header_that_is_no_table_of_tensors_is_refused(tmp_path: Path, header: bytes, word: str) -> None:
    assert word in refused(write_raw(tmp_path / "x.safetensors", header, bytes(8)))


def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    one = json.dumps(entry())
    header = f'{{"model.norm.weight": {one}, "model.norm.weight": {one}}}'.encode()
    message = refused(write_raw(tmp_path / "x.safetensors", header, bytes(8)))
    assert "model.norm.weight" in message
    assert "twice" in message


@pytest.mark.parametrize(
    ("offsets", "word"),
    [
        ([8, 0], "data_offsets"),
        ([-8, 0], "data_offsets"),
        ([0], "data_offsets"),
        ([0, 8, 16], "data_offsets"),
        ([0.0, 8.0], "data_offsets"),
        (["0", "8"], "data_offsets"),
        ([False, 8], "data_offsets"),
        (None, "data_offsets"),
        ({"begin": 0}, "data_offsets"),
        ([0, 9], "span 9 bytes"),
        ([0, 2**80], "data_offsets"),
        ([2**61, 2**61 + 8], "belong to no tensor"),
        ([8, 16], "belong to no tensor"),
    ],
)
def test_positions_that_cannot_be_are_refused(tmp_path: Path, offsets: Any, word: str) -> None:
    message = described(tmp_path, {"model.norm.weight": entry(offsets=offsets)})
    assert word in message


@pytest.mark.parametrize(
    "shape",
    [[-1], [-2, -1], [2**62], [2**80], [1.5], ["2"], [True], "2", None, [[2]], [1] * 9, [2] * 100_000],
)
def test_shapes_that_cannot_be_are_refused(tmp_path: Path, shape: Any) -> None:
    message = described(tmp_path, {"model.norm.weight": entry(shape=shape)})
    assert "model.norm.weight" in message
    assert "shape" in message


@pytest.mark.parametrize("shape", [[2**61, 2**61], [2**61] * 8, [2**40, 0, 2**40, 3], [3]])
def test_a_shape_must_span_its_bytes_even_where_64_bits_overflow(tmp_path: Path, shape: list[int]) -> None:
    assert "span 8 bytes" in described(tmp_path, {"model.norm.weight": entry(shape=shape)})


@pytest.mark.parametrize("dtype", ["F7", "f32", "", "BF16 ", None, 32, ["F32"], "\ud800", "F" * 10_000])
def test_an_unknown_element_type_is_refused(tmp_path: Path, dtype: Any) -> None:
    message = described(tmp_path, {"model.norm.weight": entry(dtype=dtype)})
    assert "model.norm.weight" in message
    assert "element type" in message


@pytest.mark.parametrize("name", ["", "x" * 2000, "\ud800"])
def test_a_name_that_cannot_be_is_refused(tmp_path: Path, name: str) -> None:
    described(tmp_path, {name: entry()})


def test_a_name_cannot_write_on_the_terminal(tmp_path: Path) -> None:
    described(tmp_path, {"\x1b[2J\nOK": entry(shape=[-1])})


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    message = described(tmp_path, {"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12))
    assert "b begins" in message
    assert "inside" in message


def test_a_hole_between_tensors_is_refused(tmp_path: Path) -> None:
    message = described(tmp_path, {"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20))
    assert "belong to no tensor" in message


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    assert "3 bytes after the last tensor" in described(tmp_path, {"a": entry()}, bytes(11))


def test_a_truncated_file_says_how_much_is_missing(tmp_path: Path) -> None:
    message = described(tmp_path, {"a": entry(), "b": entry(offsets=[8, 16])}, bytes(11))
    assert "truncated" in message
    assert "5 are missing" in message


@given(data=st.data())
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_one_damaged_byte_of_the_header_is_refused_or_harmless(data: st.DataObject, tmp_path: Path) -> None:
    """Never another exception, and never a tensor that leaves the file."""
    path = tmp_path / "x.safetensors"
    write_safetensors(
        path, {"a.0.w": Stored("F32", np.zeros((2, 3), np.uint32)), "b": Stored("BF16", np.zeros(4, np.uint16))}
    )
    damaged = bytearray(path.read_bytes())
    header_end = 8 + struct.unpack("<Q", damaged[:8])[0]
    damaged[data.draw(st.integers(0, header_end - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        infos, _ = read_header(path)
    except CheckpointError as e:
        assert str(path) in e.message
    else:
        assert all(i.offset >= 0 and i.offset + i.nbytes <= len(damaged) for i in infos)
