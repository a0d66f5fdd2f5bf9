"""Conversions in this process, and an artifact's ranks put together again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from msconv.location import LocalDirectory
from msconv.steps import convert as step
from msconv.steps.conversion import Conversion, Converted, run
from msconv.stream.buffers import BufferSizes
from tests.checkpoints import Bits, read_rank


def prepare(model: Path, tp: int, ep: int = 1, *rest: Any, **options: Any) -> Conversion:
    """Plan to convert a directory."""
    return step.prepare(LocalDirectory(model), tp, ep, *rest, **options)


def with_buffers(conversion: Conversion, buffers: BufferSizes) -> Conversion:
    return replace(conversion, task=replace(conversion.task, buffers=buffers))


def convert(model: Path, output: Path, tp: int = 1, force: bool = False, **options: Any) -> Converted:
    return run(prepare(model, tp, output=output, **options), force)


def unfuse(name: str, config: dict[str, Any], tp: int) -> dict[str, tuple[int, int]]:
    """{source name: (rows on each rank, ranks that share them)} of one tensor of the artifact."""
    q = config["num_attention_heads"] * config["head_dim"] // tp
    copies = max(1, tp // config["num_key_value_heads"])
    kv = config["num_key_value_heads"] * config["head_dim"] * copies // tp
    ffn = config["intermediate_size"] // tp
    for fused, parts in (
        ("qkv_proj", {"q_proj": (q, 1), "k_proj": (kv, copies), "v_proj": (kv, copies)}),
        ("gate_up_proj", {"gate_proj": (ffn, 1), "up_proj": (ffn, 1)}),
    ):
        if fused in name:
            return {name.replace(fused, part): rows for part, rows in parts.items()}
    return {}


def join(artifact: Path, tp: int, config: dict[str, Any]) -> dict[str, Bits]:
    """The checkpoint's tensors put together from all ranks of an artifact."""
    ranks = [read_rank(artifact, rank) for rank in range(tp)]
    assert len({tuple(sorted(rank)) for rank in ranks}) == 1
    out: dict[str, Bits] = {}
    for name in ranks[0]:
        parts = [rank[name].bits for rank in ranks]
        if name in ("vocab_start", "rank_onehot"):
            continue
        if split := unfuse(name, config, tp):
            begin = 0
            for source, (rows, copies) in split.items():
                pieces = [part[begin : begin + rows] for part in parts]
                for rank, piece in enumerate(pieces):
                    assert np.array_equal(piece, pieces[rank // copies * copies]), source
                out[source] = np.concatenate(pieces[::copies])
                begin += rows
            assert begin == len(parts[0])
        elif "o_proj.weight" in name or "down_proj" in name:
            out[name] = np.concatenate(parts, axis=1)
        elif name in ("model.embed_tokens.weight", "lm_head.weight"):
            joined = np.concatenate(parts)
            assert not joined[config["vocab_size"] :].any()
            out[name] = joined[: config["vocab_size"]]
        else:
            assert all(np.array_equal(part, parts[0]) for part in parts), name
            out[name] = parts[0]
    return out


def config_of(model: Path) -> dict[str, Any]:
    return dict(json.loads((model / "config.json").read_text()))
