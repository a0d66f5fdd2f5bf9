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
from msconv.graph.export import build, placeholders
from msconv.graph.parameters import restore_names
from msconv.graph.spec import Local
from msconv.layout.cuts import Mesh
from msconv_runtime.artifact import Artifact
from msconv_runtime.graphs import NO_KERNELS, Graphs, Place
from msconv_runtime.roles import DECODE, PREFILL, of_variant
from msconv_runtime.sglang import slot
from msconv_runtime.targets import CPU

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class MindSporeForCausalLM(slot.MindSporeForCausalLM):
    def get_arch(self, config: Any) -> Any:
        return TracedModel


class TracedModel(slot.ArtifactModel):
    def load_weights(self, weights: Iterable[Any]) -> None:
        self.graphs = TracedGraphs(self.artifact, Path(os.environ["TRACED_CHECKPOINT"]))


class TracedGraphs(Graphs):
    """Dense Qwen3, one rank."""

    def __init__(self, artifact: Artifact, checkpoint: Path) -> None:
        self.artifact, self.mode, self.is_draft = artifact, "mmap", False
        self.target, self.place = CPU, Place()
        self.library, self.is_compiled = NO_KERNELS, False
        graphs = of_variant(artifact.graphs(CPU.name), "")
        self.entries = {role.name: graphs[role.name] for role in (PREFILL, DECODE)}
        self._compiles_at_ready = 0
        self._known_caches: list[Any] = []
        self._ran_with_them: set[str] = set()
        self._single = None
        self.seconds = {}
        ms.set_context(mode=ms.GRAPH_MODE)
        config = configure(json.loads((checkpoint / "config.json").read_text()), "config.json")[1]
        read = Checkpoint(checkpoint)
        self.tensors: dict[str, Any] = {}
        self.cells = {}
        for role in (PREFILL, DECODE):
            _, net, inputs = build(Local(config, Mesh(1), CPU, role))
            restore_names(net)
            for parameter in net.get_parameters():
                if parameter.name not in self.tensors:
                    self.tensors[parameter.name] = Tensor.from_numpy(read(parameter.name).numpy())
                name = parameter.name
                parameter.assign_value(self.tensors[name])
                parameter.name = name  # assign_value drops it
            net.set_inputs(*placeholders(inputs))
            self.cells[role.name] = net


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
