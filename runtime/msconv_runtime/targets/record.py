"""What a target is: every fact of a device that graphs are compiled for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["cpu", "npu", "onnx"]
SWIGLU = "swiglu"  # a fusion: an MLP's activation, silu(gate) * up, as one operation


@dataclass(frozen=True)
class Device:
    """A kind of device.  `words`: in a sentence.  `is_host`: graphs run on this machine's own processors, in
    its memory, in any process.  `has_run`: graphs of msconv have run on one.  `runs`: where its graphs run, if not
    in any process, said of them.  `served_by`: who serves them, if that is not msconv."""

    kind: Kind
    words: str
    is_host: bool
    has_run: bool
    runs: str = ""
    served_by: str = ""


ALL_DEVICES: dict[str, Device] = {
    d.kind: d
    for d in (
        Device("cpu", "a CPU", is_host=True, has_run=True),
        Device("npu", "an NPU", is_host=False, has_run=False, runs=" graphs run on an NPU inside SGLang only."),
        Device(
            "onnx",
            "an ONNX runtime",
            is_host=False,
            has_run=True,
            runs=" graphs run in an ONNX runtime.",
            served_by="onnxruntime-genai loads the artifact's directory; see docs/onnx.md",
        ),
    )
}
DEVICES = {kind: device for kind, device in ALL_DEVICES.items() if not device.served_by}  # msconv serves on them


@dataclass(frozen=True)
class Form:
    """What a target's graphs are written as.

    `place`: a file's path in the artifact, of {target} and {name}; `names`: the name there of a graph that is not
    called its own.  `package` writes it, of the extra `extra` of msconv.
    `check`: the module of the runtime that reads a file before anybody loads it.  `export`, `run`: those of
    msconv.graph and msconv.verify that write and that run it.  `beside`: files that lie beside the graphs.
    `points_at_weights`: a graph says where in which file its weights are.  `returns_caches`: it gives each cache
    anew, after its role's outputs, and writes into none.
    """

    place: str
    package: str
    extra: str
    check: str
    export: str
    run: str
    names: Mapping[str, str] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    points_at_weights: bool = False
    returns_caches: bool = False

    def path(self, target: str, name: str) -> str:
        """Where the graph of that name is."""
        return self.place.format(target=target, name=self.names.get(name, name))

    def is_place(self, target: str, path: str) -> bool:
        """Whether a graph of the target could be there: earlier versions had other names for some."""
        pattern = re.escape(self.place).replace(r"\{target\}", target).replace(r"\{name\}", r"\w{1,64}")
        return re.fullmatch(pattern, path, re.ASCII) is not None


MINDIR = Form(
    place="graphs/{target}/{name}.mindir",
    package="mindspore",
    extra="compile",
    check="mindir_check",
    export="export",
    run="candidates",
)


@dataclass(frozen=True)
class DeviceModel:
    """A device that a target's graphs run on.  `memory_bytes`: as the driver reports it, for one rank."""

    name: str
    memory_bytes: int


@dataclass(frozen=True)
class Figures:
    """What is published of one device's speed, for the bounds of `msconv plan --roofline`.  Nothing here was
    measured by msconv.  `device`: one rank's, as a person names it.  `memory_bytes_per_s`: of its memory.
    `half_ops_per_s`, `int8_ops_per_s`: dense products, a multiplication and an addition being two.
    `link_bytes_per_s`: in one direction, to all others of its machine together; `outer_bytes_per_s`: to those of
    other machines.  None: no figure with a source was found, and bounds that need it are refused.
    `per_machine`: devices that the links join.  `sources`: (what, address)."""

    device: str
    memory_bytes_per_s: float | None
    half_ops_per_s: float | None
    int8_ops_per_s: float | None
    link_bytes_per_s: float | None
    outer_bytes_per_s: float | None
    per_machine: int
    sources: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Paging:
    """What a target's attention takes.  `slots`: a page's, where the graphs fix it; else the server chooses one of
    `pages`, the best first: multiples of `multiple`, at most `elements` of a head in a page.  Heads are multiples
    of `head_multiple`, up to `head_limit` wide (0: any width)."""

    slots: int | None = None
    pages: tuple[int, ...] = (16,)
    multiple: int = 1
    elements: int = 0
    head_multiple: int = 1
    head_limit: int = 0


@dataclass(frozen=True)
class Target:
    """`kind`: the device, in SGLang's words.  `dtype`: of activations and caches.  `graphs`: (role, variant) of
    each; `draft_graphs`: those that an artifact with a draft has besides; `asked`: variants that are made only if
    somebody asks for them.  `fusions`: what its graphs have as one operation only if somebody asks for it, while
    no device has shown that operation to be right.  `form`: what graphs are written as.  `operations`: the package
    of msconv.graph that has a target's operations.

    `mask`: what a prefill mask holds where it hides, None for graphs without a mask input.  `nz`: matrices are
    cast to the NZ format at load.  `rounds_weights`: stored values may be rounded to the graphs' type.
    `only_dtype`: the one type that weights for it may be stored as.  `epsilon`: of rounding in `dtype`.

    `prefill_reads_cache`: the prefill graph attends to what earlier calls cached.  `decode_min_sequences`: fewer
    run faster in the prefill graph, unless the two differ in their experts or in latent attention.  `chip`: what
    CANN calls the device, and its version.  `cumulative_counts`: its sort of tokens by expert gives where those of
    each end, not how many they are.  `token_scales`: its products of int8 take a scale for each token.
    `figures`: published speeds of devices that its graphs run on.
    """

    name: str
    kind: Kind
    dtype: str
    graphs: tuple[tuple[str, str], ...]
    operations: str
    paging: Paging
    epsilon: float
    mask: float | None = None
    nz: bool = False
    rounds_weights: bool = True
    only_dtype: str = ""
    draft_graphs: tuple[tuple[str, str], ...] = ()
    prefill_reads_cache: bool = False
    decode_min_sequences: int = 0
    cumulative_counts: bool = False
    token_scales: bool = True
    chip: tuple[str, int] | None = None
    devices: tuple[DeviceModel, ...] = ()
    figures: tuple[Figures, ...] = ()
    form: Form = MINDIR
    asked: tuple[str, ...] = ()
    fusions: tuple[str, ...] = ()

    @property
    def device(self) -> Device:
        return ALL_DEVICES[self.kind]
