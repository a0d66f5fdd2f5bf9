"""Faults in the graphs of a model that gives its draft hidden states."""

from __future__ import annotations

from typing import Any

from mindspore import ops as functional


def streams_exchanged(self: Any, *inputs: Any) -> Any:
    """`DecoderWithDraft.construct`, with the layers that a draft reads the wrong way round: of two or three, the
    first and the last in each other's place."""
    step = self.begin(inputs)
    x = self.embed(inputs[0])
    h = self.first_norm(x)
    streams: Any = ()
    for i in range(self.num_layers):
        if self.is_captured[i]:
            streams = (x, *streams)
        first = self.num_inputs + self.num_caches * i
        h, x = self.layers[i](h, x, step, inputs[first : first + self.num_caches])
    hidden = functional.concat(streams, -1)
    if not self.has_all_rows:
        h = self.last(h, step)
    return self.results[0](h), self.results[1](hidden)
