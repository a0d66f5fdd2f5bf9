"""Graphs kept beside artifacts, in a directory that many may share: what was compiled once is taken again.

A graph is found by all that it depends on: configuration, layout, target, role, what is fused, the stored type of
each weight, the version of MindSpore and msconv's own code.  It holds no weights: artifacts of one configuration
share it.

What is taken is checked like a stranger's artifact: damage is found by its digest, and a graph that msconv would
not make is refused.  Whether it computes the model is for `msconv verify` to find, as with every graph.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

import msconv_runtime
from msconv_runtime.artifact import Graph, digest_bytes, sync_directory
from msconv_runtime.errors import ArtifactError, ResourceError
from msconv_runtime.mindir_check import refusal

from .spec import Local
from .toolchain import mindspore_version

KEY_CHARACTERS = 40
ELSEWHERE = "--graphs may name another directory."


class GraphStore:
    """A directory of graphs: two files each, the MindIR and, written last, its manifest entry.

    Raises ResourceError if it cannot be made or written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ResourceError(f"{directory}: {e.strerror}.", ELSEWHERE) from None

    def take(self, local: Local) -> tuple[Graph, bytes] | None:
        """A kept graph and its manifest entry, None if there is none.  Raises ArtifactError for one that is
        damaged, or that msconv would not make."""
        entry, proto = self._files(local)
        try:
            described, data = entry.read_bytes(), proto.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as e:
            raise ResourceError(f"{e.filename}: {e.strerror}.", ELSEWHERE) from None
        try:
            graph = msgspec.json.decode(described, type=Graph)
        except (msgspec.DecodeError, UnicodeDecodeError) as e:
            raise _unfit(entry, f"is no entry of a graph: {e}") from None
        wanted = (local.target.name, local.role.name, local.variant, list(local.fused))
        if (graph.target, graph.role, graph.variant, graph.fused) != wanted:
            raise _unfit(entry, f"describes another graph than {local.title}")
        if (graph.size, graph.digest) != (len(data), digest_bytes(data)):
            raise _unfit(proto, "is not as it was written: its size or digest differs")
        if problem := refusal(data, graph, local.mesh.tp):
            raise _unfit(proto, problem)
        return graph, data

    def leave(self, local: Local, graph: Graph, data: bytes) -> None:
        """Keep a graph for whoever asks for it next; a process that dies here leaves no entry."""
        entry, proto = self._files(local)
        try:
            for path, content in ((proto, data), (entry, msgspec.json.encode(graph))):
                with tempfile.NamedTemporaryFile(dir=self.directory, prefix=".part-", delete=False) as f:
                    f.write(content)
                    f.flush()
                    os.fsync(f.fileno())
                    os.fchmod(f.fileno(), 0o644)
                Path(f.name).replace(path)
            sync_directory(self.directory)
        except OSError as e:
            raise ResourceError(f"{self.directory}: {e.strerror}.", ELSEWHERE) from None

    def _files(self, local: Local) -> tuple[Path, Path]:
        key = key_of(local)
        return self.directory / f"{key}.json", self.directory / f"{key}.mindir"


def key_of(local: Local) -> str:
    """A digest of all that a graph depends on."""
    try:
        mindspore = version("mindspore")
    except PackageNotFoundError:
        mindspore = mindspore_version()  # says what to install
    facts = repr((replace(local, types=dict(sorted(local.types.items()))), mindspore, code_digest()))
    return hashlib.sha256(facts.encode()).hexdigest()[:KEY_CHARACTERS]


@functools.cache
def code_digest() -> str:
    """Of msconv's own code: what graphs are made by."""
    digest = hashlib.sha256()
    for root in (Path(__file__).parents[1], Path(msconv_runtime.__file__).parent):
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _unfit(path: Path, why: str) -> ArtifactError:
    return ArtifactError(f"{path}: {why}.", "Remove it: it will be made anew.")
