"""Random Qwen3 checkpoints, and a safetensors reader and writer of the tests' own."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[Any]

SMALL: dict[str, Any] = {
    "vocab_size": 1003,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
BITS: dict[str, Any] = {  # values as bits: exact
    "F32": np.uint32,
    "F16": np.uint16,
    "BF16": np.uint16,
    "F8_E4M3": np.uint8,
    "I8": np.int8,
    "I32": np.uint32,
    "I64": np.int64,
}


@dataclass(frozen=True)
class Stored:
    """One tensor as it lies in a file: its safetensors type code and its bits."""

    code: str
    bits: Bits


def make_qwen3(
    directory: Path, dtype: str = "float32", shards: int = 1, seed: int = 0, **config_overrides: Any
) -> Path:
    """A random Qwen3 checkpoint, written by transformers.  Norms and biases are random too."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    values = {**SMALL, **config_overrides}
    theta = values.pop("rope_theta")
    values.setdefault("rope_parameters", {"rope_type": "default"})
    values["rope_parameters"] = {"rope_theta": theta, **values["rope_parameters"]}
    model = Qwen3ForCausalLM(Qwen3Config(bos_token_id=1, eos_token_id=2, **values))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    model = model.to(getattr(torch, dtype))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(directory, max_shard_size=size + 1 if shards == 1 else -(-size // shards))
    return directory


def read_safetensors(path: Path) -> dict[str, Stored]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    out = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            bits = np.frombuffer(data[begin:end], BITS[entry["dtype"]]).reshape(entry["shape"])
            out[name] = Stored(entry["dtype"], bits)
    return out


def write_safetensors(path: Path, tensors: dict[str, Stored]) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        offsets = [end, end + tensor.bits.nbytes]
        header[name] = {"dtype": tensor.code, "shape": list(tensor.bits.shape), "data_offsets": offsets}
        end += tensor.bits.nbytes
    write_raw(path, json.dumps(header).encode(), b"".join(t.bits.tobytes() for t in tensors.values()))


def write_raw(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    """A file whose header says whatever it likes, and lies about its length if asked to."""
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def read_checkpoint(directory: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint, over all its shards."""
    out: dict[str, Stored] = {}
    for path in sorted(directory.glob("*.safetensors")):
        out |= read_safetensors(path)
    return out


def read_rank(artifact: Path, rank: int) -> dict[str, Stored]:
    """Every tensor of one rank of an artifact."""
    out: dict[str, Stored] = {}
    for path in sorted((artifact / "weights").glob(f"model-rank-{rank}-part-*.safetensors")):
        out |= read_safetensors(path)
    return out


def read_tree(directory: Path) -> dict[str, bytes]:
    """Every file that an artifact promises (neither .msconv nor the report), by its relative path."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and ".msconv" not in path.parts and path.name != "report.html"
    }


def edit_json(path: Path, **changes: Any) -> None:
    """Set top-level keys; None removes one."""
    values = json.loads(path.read_text())
    for key, value in changes.items():
        values.pop(key, None)
        if value is not None:
            values[key] = value
    path.write_text(json.dumps(values))
