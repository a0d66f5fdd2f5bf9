"""Graphs and their manifest entries, written by the module of their form; of deep models in a process each."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from msconv_runtime.artifact import Graph, digest_bytes
from msconv_runtime.errors import MsconvError, ResourceError, UsageError
from msconv_runtime.roles import DECODE
from msconv_runtime.targets import Target

from ..graph.spec import Exported, Local
from ..graph.toolchain import require
from ..process import peak_rss_bytes, without_signals

LAYERS_AT_HOME = 16  # deeper models are compiled in processes of their own, one a graph
ENDING_S = 10  # until a process that has closed its pipe has ended


@dataclass(frozen=True)
class Made:
    """What exporting gave: the graph, the version of what wrote it, peak resident bytes."""

    exported: Exported
    version: str
    peak_rss_bytes: int


def made(local: Local) -> Made:
    """Export a graph.  Raises MsconvError."""
    return _export(local) if local.config.layers <= LAYERS_AT_HOME else _export_in_a_process(local)


def entry(local: Local, made: Made) -> Graph:
    """The manifest's entry of a graph."""
    exported, is_dense = made.exported, local.config.moe is None and local.config.mla is None
    is_decode = local.role.name == DECODE.name
    graph = Graph(
        target=local.target.name,
        role=local.role.name,
        variant=local.variant,
        path="",
        size=len(exported.proto),
        digest=digest_bytes(exported.proto),
        mindspore="",
        nodes=exported.nodes,
        kinds=exported.kinds,
        inputs=exported.inputs,
        outputs=exported.outputs,
        reads=exported.parameters,
        min_sequences=local.target.decode_min_sequences if is_decode and is_dense else 0,
        groups=exported.groups,
        nz=exported.nz,
        fused=list(local.fused),
    )
    form = local.target.form
    return msgspec.structs.replace(graph, path=form.path(graph.target, graph.name), **{form.package: made.version})


def exporter(target: Target) -> Any:
    """The module that writes a target's graphs."""
    return import_module(f"..graph.{target.form.export}", __package__)


def _export(local: Local) -> Made:
    version = require(local.target.form)
    return Made(exporter(local.target).export(local), version, peak_rss_bytes())


def _export_in_a_process(local: Local) -> Made:
    """The same in a process of its own: MindSpore's front end keeps what it built, and the graphs of a deep model
    would add up."""
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_export_for, args=(theirs, local), daemon=True)
    with without_signals():
        process.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        process.join(ENDING_S)
        raise _ended(local, process.exitcode) from None
    finally:
        ours.close()
        process.kill()  # it has nothing more to do
        process.join()
    if isinstance(found, Exception):
        raise found
    assert isinstance(found, Made)
    return found


def _ended(local: Local, code: int | None) -> MsconvError:
    """Why the process sent nothing: a signal ended it, or Python could not begin."""
    if code is None or code < 0:
        return ResourceError(
            f"{local.title}: the process that compiled it was ended, most likely for want of memory.",
            "A model of 61 layers needs 2 GiB.",
        )
    return UsageError(
        f"{local.title}: the process that compiles it ended with {code} before it began.",
        "It imports the script that calls: in a script, keep the work under `if __name__ == '__main__':`.",
    )


def _export_for(theirs: Connection, local: Local) -> None:
    """Send what exporting gave, or why it could not be."""
    try:
        theirs.send(_export(local))
    except Exception as e:
        theirs.send(e)
