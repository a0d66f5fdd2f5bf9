"""Resharding as it is usually written: load everything, slice, concatenate, save each rank."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def main() -> None:
    source, target, tp = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    target.mkdir(parents=True)
    full: dict[str, torch.Tensor] = {}
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, framework="pt") as f:
            for name in f.keys():  # noqa: SIM118
                full[name] = f.get_tensor(name)
    ranks = []
    for rank in range(tp):
        out: dict[str, torch.Tensor] = {}
        for name, tensor in full.items():
            if "norm" in name:
                out[name] = tensor
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                out[name] = tensor.chunk(tp, 1)[rank].contiguous()
            elif ".q_proj." in name or ".gate_proj." in name:
                parts = ("q", "k", "v") if ".q_proj." in name else ("gate", "up")
                first = parts[0] + "_proj"
                joined = name.replace(first, "qkv_proj" if len(parts) == 3 else "gate_up_proj")
                out[joined] = torch.cat([full[name.replace(first, p + "_proj")].chunk(tp, 0)[rank] for p in parts])
            elif not name.endswith(("k_proj.weight", "v_proj.weight", "up_proj.weight")):
                out[name] = tensor.chunk(tp, 0)[rank].contiguous()
        ranks.append(out)
    for rank, out in enumerate(ranks):
        save_file(out, target / f"rank{rank}.safetensors")


main()
