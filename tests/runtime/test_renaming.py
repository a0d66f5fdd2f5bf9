"""Kernels and groups get the names that they have here; all else of a graph stays, byte for byte."""

from __future__ import annotations

from pathlib import Path

from mindspore.train import mind_ir_pb2 as pb

from msconv_runtime.mindir_check.renaming import renamed


def by_mindspore(data: bytes, place: str) -> bytes:
    """The same by MindSpore's own reader and writer."""
    model = pb.ModelProto.FromString(data)
    for primitive in (p for p in model.primitives if p.op_type == "Custom"):
        for attribute in (a for a in primitive.attribute if a.name == "func_name"):
            attribute.s = place.encode() + attribute.s[attribute.s.index(b":") :]
    written: bytes = model.SerializeToString()
    return written


def test_kernels_are_renamed_as_mindspore_would_write_it(compiled: Path) -> None:
    graphs = sorted(compiled.glob("graphs/cpu/*.mindir"))
    customs = 0
    for path in graphs:
        data = path.read_bytes()
        for place in ("/a", "/" + "ä" * 100, "/" + "long" * 5000):  # lengths of one, two and three bytes

            def rename(kind: str, attribute: str, text: str, place: str = place) -> str:
                return place + text[text.index(":") :] if (kind, attribute) == ("Custom", "func_name") else text

            found = renamed(data, rename)
            assert found == by_mindspore(data, place), path.name
            customs += found != data
        assert renamed(data, lambda kind, attribute, text: text) == data
    assert customs >= 3 * sum(path.stem.endswith("_compiled") for path in graphs) > 0
