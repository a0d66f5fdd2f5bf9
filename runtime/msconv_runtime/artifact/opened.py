"""An artifact's directory, opened once: manifest, configuration, weights, graphs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from ..draft_kinds import DRAFT_KINDS, DraftKind
from ..errors import ArtifactError
from ..roles import DECODE, PREFILL, can_serve, of_model, of_variant
from .consistency import contradiction
from .directory import read_manifest, write_manifest
from .files import read_file
from .manifest import Graph, Manifest, Weights, digest_bytes

CONFIG = "config.json"
MAX_CONFIG_BYTES = 16 << 20


class Artifact:
    """A finished artifact at `root`."""

    def __init__(self, root: str | os.PathLike[str], manifest: Manifest | None = None) -> None:
        """`manifest`: what was read from there already.  Raises ArtifactError as `read_manifest` does."""
        self.root = Path(root)
        self.manifest = read_manifest(self.root) if manifest is None else manifest

    @property
    def tp(self) -> int:
        return self.manifest.parallel.tp

    @property
    def ep(self) -> int:
        return self.manifest.parallel.ep

    @property
    def weights(self) -> Weights:
        """Raises ArtifactError if the artifact has graphs only."""
        if self.manifest.weights is None:
            raise ArtifactError(
                f"{self.root}: holds graphs and no weights.",
                f"`msconv convert --model <dir> --output {self.root}` adds them.",
            )
        return self.manifest.weights

    @property
    def targets(self) -> list[str]:
        """Those it has graphs for, sorted."""
        return sorted({g.target for g in self.manifest.graphs})

    @property
    def is_draft(self) -> bool:
        """Whether it cannot answer by itself: its graphs draft for another artifact's model."""
        return bool(self.manifest.graphs) and not of_model(self.manifest.graphs)

    @property
    def draft_kind(self) -> DraftKind:
        """Of an artifact that is a draft."""
        return DRAFT_KINDS[self.manifest.model.family]

    def graphs(self, target: str) -> list[Graph]:
        """Raises ArtifactError unless a batch can be prefilled and decoded on the target, or a draft extended."""
        graphs = self.manifest.graphs_for(target)
        hint = f"Run `msconv compile {self.root} --target {target}`."
        if not graphs:
            have = f" (only for {', '.join(self.targets)})." if self.targets else "."
            raise ArtifactError(f"{self.root}: has no graphs for {target}{have}", hint)
        there = of_variant(graphs, "")
        if not (self.is_draft or can_serve(there)):
            lacks = " and no ".join(role.name for role in (PREFILL, DECODE) if role.name not in there)
            raise ArtifactError(f"{self.root}: has no graphs for {target} that can serve: no {lacks} graph.", hint)
        return graphs

    def config_bytes(self) -> bytes:
        """The model's config.json.  Raises ArtifactError if it is not the one that the artifact was made from."""
        path = self.root / CONFIG
        try:
            data = read_file(path, MAX_CONFIG_BYTES)
        except OSError as e:
            raise ArtifactError(f"{path}: cannot be read: {e.strerror}.", "Copy the artifact again.") from None
        if digest_bytes(data) != self.manifest.model.config_digest:
            raise ArtifactError(
                f"{path}: is not the configuration this artifact was made from.", "Convert again with --force."
            )
        return data

    def changed(self, **fields: Any) -> Artifact:
        """The artifact with other fields of its manifest, written down.  Hold the directory's lock.  Raises
        ArtifactError, and changes nothing, if the next reader would refuse it."""
        manifest = msgspec.structs.replace(self.manifest, **fields)
        if problem := contradiction(manifest):
            raise ArtifactError(
                f"{self.root}: its new manifest would contradict itself and is not written: {problem}.",
                "Nothing was replaced.  This is a fault in msconv: please report it with the command you ran.",
            )
        write_manifest(self.root, manifest)
        return Artifact(self.root, manifest)
