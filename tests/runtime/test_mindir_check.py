"""Graphs are held against what msconv exports before MindSpore sees them: ours pass, none that is forged does."""

from __future__ import annotations

import itertools
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import text_format
from mindspore.train import mind_ir_pb2 as pb
from msgspec.structs import replace

from msconv_runtime.artifact import Graph, digest_bytes
from msconv_runtime.errors import ArtifactError
from msconv_runtime.mindir_check import check_mindir, kind_of, refusal
from msconv_runtime.mindir_check.allowed import (
    ALLOWED,
    FUSED,
    GRAPH_ATTRIBUTES,
    KERNELS,
    LIBRARY,
    OF_EARLIER_VERSIONS,
    OF_MINDSPORE_28,
)
from msconv_runtime.targets import FUSIONS, MINDIR, SWIGLU, TARGETS
from tests.every import EVERY
from tests.exports import INT8, MODELS, exported
from tests.mindirs import LOAD, MUL, UMONAD, encode, entry, field, model, node, primitive, shape, small, varint
from tests.runtime.mindir_forging import FORGES, damaged, meaning

SEED = 20261128
FORGED, DAMAGED = 1400, 1000
SECONDS = 30
UNSHIFTED = "qwen3 unshifted int8"
AT_ONCE = ("qwen3", UNSHIFTED)  # on one rank, kernels compute all of a layer at once
FOR_KERNELS = (UNSHIFTED, "deepseek_v3 dynamic int8")  # other graphs have nothing in them that others do not
REFUSED = "is not a graph that msconv makes, and was not loaded: "


def graphs(every: bool) -> Iterator[tuple[bytes, Graph, int]]:
    """All families, targets, roles and variants; layouts that change the graph take turns.  Without `every`: one
    in two of them, and none for 910C, which are those for 910B."""
    layouts, turns = itertools.cycle([(1, 1), (2, 1), (2, 2)]), itertools.cycle([True, every])
    targets = [t for t in TARGETS.values() if t.form is MINDIR]
    for name, target in itertools.product(MODELS, targets):
        for role, variant in target.graphs:
            if name in FOR_KERNELS and variant != "compiled":
                continue
            tp, ep = next(layouts) if name != UNSHIFTED else (1, 1)
            tp, ep = (1, 1) if name in AT_ONCE and variant == "compiled" else (tp, ep)
            ep = ep if (" " not in name and "moe" in name) or "deepseek" in name else 1
            if name in INT8 and INT8[name][0] != "static" and not target.token_scales:
                continue
            if (every or target.name != "ascend910c") and next(turns):
                yield *exported(name, target.name, role, variant, tp, ep), tp


@pytest.mark.slow
def test_every_exported_graph_passes_and_the_list_holds_nothing_else() -> None:
    used: set[tuple[str, str]] = set()
    sets: set[tuple[str, tuple[str, ...]]] = set()
    named: set[str] = set()
    for data, graph, tp in graphs(EVERY):
        assert refusal(data, graph, tp) == "", f"{graph.target} {graph.name}"
        found = pb.ModelProto.FromString(data)
        for p in found.primitives:
            names = tuple(sorted(a.name for a in p.attribute))
            title = p.op_type
            if title == "Custom":
                title = next(a.s.decode() for a in p.attribute if a.name == "func_name")
            used.add((kind_of(graph.target, graph.variant), title))
            sets.add((title, names))
        named |= {a.name for a in found.graph.attribute}
    older = {(kind, name) for kind, names in OF_MINDSPORE_28.items() for name in names.split()}
    older |= {("compiled", f"{LIBRARY}:{name}") for name in OF_EARLIER_VERSIONS}
    assert used == {(kind, name) for kind, table in ALLOWED.items() for name in table} - older
    assert named == set(GRAPH_ATTRIBUTES)
    everything = {name: p for table in ALLOWED.values() for name, p in table.items()}
    written = {n: p for n, p in everything.items() if n.rpartition(":")[2] not in OF_EARLIER_VERSIONS}
    assert sets == {(n, tuple(sorted(a))) for n, p in written.items() for a in p.attributes}


def test_a_fused_graph_passes_only_if_its_entry_says_so() -> None:
    data, graph = exported("qwen3", "ascend910b", "decode", fused=(SWIGLU,))
    assert refusal(data, graph, 1) == ""
    assert refusal(data, replace(graph, target="ascend910c"), 1) == ""
    found = {p.op_type for p in pb.ModelProto.FromString(data).primitives}
    assert found - set(ALLOWED["ascend"]) == set(FUSED[SWIGLU])
    assert FUSED.keys() == set(FUSIONS)
    for odd in (replace(graph, fused=[]), replace(graph, fused=["another"])):
        assert "no graph for ascend910b has a Swiglu" in refusal(data, odd, 1)


def test_a_deep_models_graph_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a layer is one node, all weights are loaded before the first."""
    for name in AT_ONCE:
        monkeypatch.setitem(MODELS, f"{name} deep", MODELS[name] | {"num_hidden_layers": 48})
        if name in INT8:
            monkeypatch.setitem(INT8, f"{name} deep", INT8[name])
        assert refusal(*exported(f"{name} deep", "cpu", "mixed", "compiled"), 1) == ""


def test_the_kernels_are_those_of_the_library() -> None:
    from msconv_runtime import kernels as native

    source = "".join((Path(native.__file__).parent / name).read_text() for name in native.UNITS)
    assert set(re.findall(r"^OPERATION\((\w+)\)", source, re.M)) == set(KERNELS)
    assert native.LIBRARY == LIBRARY


BASES = {
    "by hand": lambda: (small(), entry(small())),
    "cpu": lambda: exported("qwen3", "cpu", "decode"),
    "compiled": lambda: exported("qwen3", "cpu", "mixed", "compiled", 2),
    "ascend": lambda: exported("qwen3", "ascend910b", "decode"),
}
RANKS = {"compiled": 2}


def test_nothing_forged_is_taken_for_a_graph() -> None:
    """Forged graphs come with a manifest of their own: their size, digest, number of nodes and kinds are right."""
    rng = random.Random(SEED)
    bases = {name: make() for name, make in BASES.items()}
    for name, (data, graph) in bases.items():
        assert refusal(data, graph, RANKS.get(name, 1)) == ""
    started, told, slowest = time.process_time(), 0, 0.0
    for i in range(FORGED):
        name, forge = rng.choice(list(bases)), FORGES[i % len(FORGES)]
        data, graph = bases[name]
        changed = pb.ModelProto.FromString(data)
        try:
            forge(changed, rng)
            bad = changed.SerializeToString(deterministic=True)
        except (IndexError, ValueError):  # this graph has none of what would be forged
            continue
        if bad == data:
            continue
        own = replace(graph, size=len(bad), digest=digest_bytes(bad), nodes=len(changed.graph.node), kinds={})
        begun = time.process_time()
        with pytest.raises(ArtifactError, match=REFUSED) as refused:
            check_mindir("forged", bad, own, RANKS.get(name, 1))
            pytest.fail(f"{forge.__name__} of {name}, forge {i}: taken for a graph")
        slowest = max(slowest, time.process_time() - begun)
        assert refused.value.message.isprintable(), refused.value.message
        assert len(refused.value.message) < 1000
        told += 1
    assert told > 0.9 * FORGED
    assert slowest < 2
    assert time.process_time() - started < SECONDS


def test_damaged_bytes_are_refused_or_mean_the_same() -> None:
    rng = random.Random(SEED)
    bases = {name: make() for name, make in BASES.items()}
    meanings = {name: meaning(data) for name, (data, _) in bases.items()}
    started, passed = time.process_time(), 0
    for i in range(DAMAGED):
        name = rng.choice(list(bases))
        data, graph = bases[name]
        bad = damaged(data, rng)
        if refusal(bad, replace(graph, size=len(bad), kinds={}), RANKS.get(name, 1)):
            continue
        passed += 1
        found = meaning(bad)
        assert found is not None, f"{name}, damage {i}: MindSpore reads another file"
        assert found == meanings[name], f"{name}, damage {i}: {text_format.MessageToString(found)[:500]}"
    assert passed < 0.2 * DAMAGED
    assert time.process_time() - started < SECONDS


def test_what_passes_is_read_alike_by_two_readers() -> None:
    """The exporter's spelling is the only one: MindSpore's classes write the same bytes again."""
    for make in BASES.values():
        data, _ = make()
        assert pb.ModelProto.FromString(data).SerializeToString(deterministic=True) == data


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "ir_version is None"),
        (b"\x7fELF\x02\x01\x01" + bytes(500), "field 15 at byte 0"),
        (small()[:-1], "cut off, too long"),
        (small() + field(13, 3), "there twice, or out of order"),
        (small() + encode([(8, [(2, "f")])]), "has field 8"),
        (small().replace(b"\x0a\x031.1", b"\x0a\x83\x001.1"), "not in its shortest form"),
        (b"\x0a" + varint((1 << 64) - 1), "has 18446744073709551615 bytes, 0 are left"),
        (b"\x0b" * 100000, "has wire type 3"),
        (b"\xff" * 100000, "too long"),
    ],
)
def test_bytes_that_are_no_graph(data: bytes, told: str) -> None:
    assert told in refusal(data, entry(data), 1)


def test_a_graph_of_another_number_of_ranks() -> None:
    gather = primitive(
        "AllGather",
        4,
        False,
        [
            [(1, "fusion"), (3, 0), (16, 7)],
            [(1, "group"), (5, "msconv_tp"), (16, 8)],
            [(1, "index"), (3, 0), (16, 7)],
            [(1, "no_eliminate"), (3, 1), (16, 9)],
            [(1, "rank_size"), (3, 2), (16, 7)],
        ],
    )
    nodes = [
        node(0, "Constant", [], [(1, "value"), (16, UMONAD)]),
        node(1, "REF::Load:2", ["msconv:lm_head.weight", "n0"], shape([23, 4])),
        node(2, "REF::Mul:3", ["n1", "n1"], shape([23, 4])),
        node(3, "REF::AllGather:4", ["n2"], shape([-1, 23])),
    ]
    data = model(nodes, [LOAD, MUL, gather])
    given = entry(data, target="ascend910b")
    assert refusal(data, given, 2) == ""
    assert "other attributes than a AllGather may have" in refusal(data, given, 4)
    assert "no graph for cpu has a AllGather" in refusal(data, entry(data), 2)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"nodes": 5}, "has 4 nodes of other kinds or number"),
        ({"kinds": {"Mul": 4}}, "has 4 nodes of other kinds or number"),
        ({"inputs": []}, "takes 2 inputs, 0 by the manifest"),
        ({"outputs": []}, "gives 1 outputs, 0 by the manifest"),
        ({"reads": []}, "is there twice, or not in the manifest"),
    ],
)
def test_a_manifest_that_says_something_else(change: dict[str, object], told: str) -> None:
    data = small()
    assert told in refusal(data, replace(entry(data), **change), 1)
