"""A layer of multi-token prediction that has learnt a little of its model's own sequences."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints import edit_json


def train_nextn(directory: Path, model: Any, sequences: list[list[int]], steps: int) -> Path:
    """Give DeepSeek-V3's checkpoint, which transformers has loaded as `model`, such a layer, learnt in `steps`."""
    import torch

    torch.manual_seed(0)
    hidden, index = model.config.hidden_size, model.config.num_hidden_layers
    layer = copy.deepcopy(model.model.layers[-1])
    project = torch.nn.Linear(2 * hidden, hidden, bias=False)
    norms = {name: copy.deepcopy(model.model.norm) for name in ("enorm", "hnorm", "shared_head.norm")}
    learning = [p for module in (layer, project, *norms.values()) for p in module.parameters()]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in learning:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(learning, 3e-3)
    for step in range(steps):
        ids = torch.tensor([sequences[step % len(sequences)]])
        with torch.no_grad():
            before = model.model(ids).last_hidden_state[:, :-2]
        embedded = model.model.embed_tokens(ids[:, 1:-1])
        x = project(torch.cat((norms["enorm"](embedded), norms["hnorm"](before)), -1))
        places = torch.arange(x.shape[1])[None]
        later = torch.full((x.shape[1],) * 2, float("-inf")).triu(1)[None, None]
        angles = model.model.rotary_emb(x, places)
        x = layer(x, attention_mask=later, position_ids=places, position_embeddings=angles)
        logits = model.lm_head(norms["shared_head.norm"](x))
        loss = torch.nn.functional.cross_entropy(logits[0], ids[0, 2:])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    parts = {name + ".weight": norm.weight for name, norm in norms.items()}
    parts |= {"eh_proj.weight": project.weight, "shared_head.head.weight": model.lm_head.weight}
    parts |= {"embed_tokens.weight": model.model.embed_tokens.weight, **_by_expert(layer.state_dict())}
    _add(directory, {f"model.layers.{index}.{name}": v.detach().numpy().copy() for name, v in parts.items()})
    return directory


def _by_expert(values: dict[str, Any]) -> dict[str, Any]:
    """As checkpoints have them: transformers stacks experts."""
    out = {name: v for name, v in values.items() if ".experts." not in name}
    for name, kinds in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        for expert, matrix in enumerate(values[f"mlp.experts.{name}"]):
            for kind, part in zip(kinds, matrix.chunk(len(kinds)), strict=True):
                out[f"mlp.experts.{expert}.{kind}.weight"] = part
    return out


def _add(directory: Path, tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    from safetensors.numpy import load_file, save_file

    (path,) = directory.glob("*.safetensors")
    save_file(load_file(path) | tensors, path, {"format": "pt"})
    edit_json(directory / "config.json", num_nextn_predict_layers=1)
