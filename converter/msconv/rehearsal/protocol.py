"""What the device's processes and the comparison agree on: both sides import it."""

from __future__ import annotations

from dataclasses import dataclass

HIDDEN = "hidden"  # after INPUTS, of a draft's calls
CALLS = "calls"  # in a rehearsal's directory: one directory a rank, with what it recorded
DEVICE_FILE = "device.json"  # in a rehearsal's directory: a Device
INPUTS = ("input_ids", "positions", "slots", "block_tables", "context_lens", "q_lens", "attention_mask")


@dataclass(frozen=True)
class Device:
    """What a process sees.  `library`: the built device.  `devices`: how many, of `memory_bytes` each.  `name`,
    `arch`: what the device calls itself to torch_npu and to CANN.  `exact`: graphs compute in float32."""

    library: str
    devices: int
    memory_bytes: int
    name: str
    arch: int
    exact: bool


def graph_file(identity: str) -> str:
    """The file in a rank's directory that holds a graph as it was loaded, by its digest."""
    return identity.replace(":", "-") + ".mindir"
