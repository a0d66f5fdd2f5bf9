"""One pass of the reference over some sequences: norms, routing, and what enters them, layer by layer.

With a place to keep them, each layer's values are written there when it is done, and read from there: a pass that
was ended goes on after the last whole layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from msconv_runtime.artifact import digest_of

from .kept import Kept

if TYPE_CHECKING:
    from .reference import Reference

NORMS = ("input_layernorm", "post_attention_layernorm")
OUT = "out"


@dataclass(frozen=True)
class Packed:
    """Sequences one after another, [1, T in all].  Positions begin anew with each, by which transformers tells
    them apart (masking_utils.find_packed_sequence_indices): no token looks into another sequence."""

    ids: Any
    lengths: list[int]
    positions: Any

    @classmethod
    def of(cls, sequences: list[list[int]]) -> Packed:
        import torch

        ids = torch.tensor([[t for s in sequences for t in s]])
        positions = torch.cat([torch.arange(len(s)) for s in sequences])[None]
        return cls(ids, [len(s) for s in sequences], positions)

    def apart(self, values: Any) -> list[Any]:
        """[1, T in all, ...] -> each sequence's, [T, ...]."""
        return list(values[0].split(self.lengths))


@dataclass
class Passed:
    """By module: the outputs of norms, what entered them, how close a router came to another choice, and which
    experts it chose [T in all, k]."""

    norms: dict[str, Any] = field(default_factory=dict)
    entering: dict[str, Any] = field(default_factory=dict)
    closest: dict[str, Any] = field(default_factory=dict)
    chosen: dict[str, Any] = field(default_factory=dict)

    @property
    def _groups(self) -> dict[str, dict[str, Any]]:
        return {"norm": self.norms, "entering": self.entering, "closest": self.closest, "chosen": self.chosen}

    def of_layer(self, prefix: str, out: Any) -> dict[str, Any]:
        """What is kept of a layer whose output is `out`."""
        found = {
            f"{kind}:{name}": value
            for kind, group in self._groups.items()
            for name, value in group.items()
            if name.startswith(prefix)
        }
        return {**found, OUT: out}

    def take(self, values: dict[str, Any]) -> None:
        """What `of_layer` gave."""
        groups = self._groups
        for key, value in values.items():
            kind, _, name = key.partition(":")
            if kind in groups:
                groups[kind][name] = value


def run_layers(reference: Reference, batch: Packed, kept: Kept) -> Passed:
    """Run transformers' model over a batch."""
    torch, model = reference.torch, reference.model.model
    layers = model.layers[: model.config.num_hidden_layers]
    key = f"reference-{digest_of([str(batch.ids.tolist())]).rpartition(':')[2]}"
    passed = Passed()
    last_out, done = None, 0
    while done < len(layers) and (values := kept.load(f"{key}-{done}")) is not None:
        passed.take(values[0])
        last_out, done = values[0][OUT], done + 1

    def after(index: int, out: Any) -> None:
        prefix = f"model.layers.{index}."
        if kept.is_there and index >= done:
            kept.save(f"{key}-{index}", passed.of_layer(prefix, out if torch.is_tensor(out) else out[0]))
            if (saved := kept.load(f"{key}-{index}")) is not None:
                passed.take(saved[0])  # in the file's pages, which the system may take back

    given = {"input_ids": batch.ids}
    if last_out is not None:
        given = {"inputs_embeds": last_out}
    reference.num_skipped = done
    try:
        with _heard(reference, passed, after), _skipped(layers[:done]), torch.no_grad():
            model(**given, position_ids=batch.positions, use_cache=False)
    finally:
        reference.num_skipped = 0
    return passed


@contextmanager
def _heard(reference: Reference, passed: Passed, after: Any) -> Iterator[None]:
    """While modules tell `passed` of what they take and give, and layers `after` of their end."""
    hooks = []

    def norm(name: str) -> Any:
        def hear(_module: Any, inputs: Any, out: Any) -> None:
            passed.norms[name] = out
            if name == "model.norm" or _captures(reference, name):
                passed.entering[name] = inputs[0]

        return hear

    def gate(name: str) -> Any:
        def hear(module: Any, _inputs: Any, out: Any) -> None:
            passed.closest[name] = reference.closeness(module, out[0])

        return hear

    def experts(name: str) -> Any:
        def hear(_module: Any, inputs: Any) -> None:
            passed.chosen[name] = inputs[1]

        return hear

    def end(index: int) -> Any:
        return lambda _module, _inputs, out: after(index, out)

    for name, module in reference.model.named_modules():
        if name.endswith(NORMS) or name == "model.norm":
            hooks.append(module.register_forward_hook(norm(name)))
        elif name.endswith("mlp.gate"):
            hooks.append(module.register_forward_hook(gate(name)))
        elif name.endswith("mlp.experts"):
            hooks.append(module.register_forward_pre_hook(experts(name)))
    hooks += [m.register_forward_hook(end(i)) for i, m in enumerate(reference.model.model.layers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _captures(reference: Reference, name: str) -> bool:
    """Whether what enters this norm is kept."""
    is_first = name.endswith("input_layernorm")
    return is_first and (reference.keeps_streams or int(name.split(".")[2]) in reference.captured)


@contextmanager
def _skipped(layers: Any) -> Iterator[None]:
    """While these give what they are given."""
    for layer in layers:
        layer.forward = lambda hidden_states, *_, **__: hidden_states
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
