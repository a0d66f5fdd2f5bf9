"""The artifact's model the way it is served without one: every tensor is read from the checkpoint and cast, the
network is built in Python, and MindSpore traces and compiles each phase when the first request needs it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mindspore as ms
import torch
from mindspore import Tensor
from safetensors.torch import load_file

from msconv.families import configure
from msconv.graph.decoder import Decoder
from msconv.graph.export import cache_inputs, placeholders
from msconv.graph.ops.cpu import CpuOps
from msconv.graph.parameters import restore_names
from msconv.graph.spec import Local
from msconv.layout.cuts import Mesh
from msconv_runtime.artifact import Manifest
from msconv_runtime.graphs import NO_KERNELS, Graphs, graphs_of
from msconv_runtime.sglang import slot

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class MindSporeForCausalLM(slot.MindSporeForCausalLM):
    def get_arch(self, config: Any) -> Any:
        return TracedModel


class TracedModel(slot.ArtifactModel):
    def load_weights(self, weights: Iterable[Any]) -> None:
        self.graphs = TracedGraphs(self.root, self.manifest, Path(os.environ["TRACED_CHECKPOINT"]))


class TracedGraphs(Graphs):
    """Dense Qwen3, one rank."""

    def __init__(self, root: Path, manifest: Manifest, checkpoint: Path) -> None:
        self.manifest, self.target = manifest, "cpu"
        self.library, self.native = NO_KERNELS, False
        self.entries = {g.phase: g for g in graphs_of(root, manifest, "cpu") if g.phase != "native"}
        self._compiles_at_ready = 0
        self._prefill_decodes_few = True
        ms.set_context(mode=ms.GRAPH_MODE)
        config = configure(json.loads((checkpoint / "config.json").read_text()), "config.json")[1]
        read = Checkpoint(checkpoint)
        self.tensors: dict[str, Any] = {}
        self.cells = {}
        for phase in ("prefill", "decode"):
            local = Local(config, Mesh(1), phase)
            ops = CpuOps(local)
            net = Decoder(ops, local)
            restore_names(net)
            for parameter in net.get_parameters():
                if parameter.name not in self.tensors:
                    self.tensors[parameter.name] = Tensor.from_numpy(read(parameter.name).numpy())
                name = parameter.name
                parameter.assign_value(self.tensors[name])
                parameter.name = name  # assign_value drops it
            net.set_inputs(*placeholders(ops.inputs() + cache_inputs(ops, local)))
            self.cells[phase] = net


class Checkpoint:
    """All tensors of a checkpoint in memory, float32, by the graphs' names."""

    def __init__(self, directory: Path) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        for path in sorted(directory.glob("*.safetensors")):
            self.tensors |= {name: t.float() for name, t in load_file(path).items()}

    def __call__(self, name: str) -> torch.Tensor:
        for fused, parts in FUSED.items():
            if f".{fused}." in name:
                return torch.cat([self.tensors[name.replace(fused, part)] for part in parts])
        return self.tensors[name].contiguous()


EntryClass = [MindSporeForCausalLM]
