"""Artifact in, the same artifact with graphs out."""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from msconv_runtime.artifact import (
    FORMAT,
    STATE_DIR,
    Graph,
    Manifest,
    Model,
    Parallel,
    Phase,
    digest_bytes,
    is_artifact,
    read_manifest,
    replace_file,
    write_manifest,
)
from msconv_runtime.errors import ArtifactError, EnvironmentProblem, ResourceError, UsageError

from .checkpoint.directory import AUXILIARY, read_small
from .checkpoint.headers import parse_json
from .checkpoint.reference import open_configuration
from .convert import TOOL, peak_rss_bytes, recordable, refuse_foreign
from .families import DecoderConfig, configure
from .graph.spec import Exported
from .layout.cuts import Mesh, make_mesh
from .layout.model import expected_sources
from .layout.plan import RANK_CONSTANTS, make_plan
from .stream.lock import exclusive

if TYPE_CHECKING:
    from .checkpoint.hub import Repository

TIMINGS = "timings.json"
LAYERS_AT_HOME = 16  # deeper models are compiled in processes of their own, one a phase
PHASES: dict[str, tuple[Phase, ...]] = {
    "cpu": ("prefill", "decode", "native"),
    "ascend910b": ("prefill", "decode", "decode_all"),
    "ascend910c": ("prefill", "decode", "decode_all"),
    "ascend310p": ("prefill", "decode", "decode_all"),
}


class Timing(msgspec.Struct, frozen=True):
    """What compiling a graph took on this machine.  `digest`: of the graph that it was."""

    digest: str
    seconds: float


@dataclass(frozen=True)
class Compiled:
    """One graph that was made."""

    graph: Graph
    seconds: float
    peak_rss_bytes: int


def configuration(root: Path, manifest: Manifest) -> DecoderConfig:
    """The model's configuration, from the artifact's own config.json.  Raises ArtifactError if it changed."""
    data = read_small(root / "config.json")
    if digest_bytes(data) != manifest.model.config_digest:
        raise ArtifactError(
            f"{root / 'config.json'}: is not the configuration this artifact was made from.",
            "Convert again with --force.",
        )
    raw = parse_json(data, str(root / "config.json"))
    assert isinstance(raw, dict)
    return configure(raw, str(root / "config.json"))[1]


def begin_without_weights(model: Path | Repository, tp: int, ep: int, root: Path) -> None:
    """Make `root` an artifact with a configuration and no weights: enough to compile for.  A later conversion
    into the same directory completes it.  Raises UsageError or ArtifactError if it holds something else."""
    mesh = make_mesh(tp, ep)
    source = open_configuration(model)
    if isinstance(model, Path):
        recordable(model)
    else:
        model.download_small(AUXILIARY)
    table, sizes = source.family.table, source.config.sizes()
    plan = make_plan(table, sizes, expected_sources(table, sizes, "bfloat16"), mesh)
    refuse_foreign(root, source.root)
    with exclusive(root):
        if is_artifact(root):
            found = read_manifest(root)
            if found.model.config_digest != source.config_digest or found.parallel != Parallel(tp, ep):
                raise ArtifactError(
                    f"{root}: holds an artifact of another model or layout ({found.model.source}, "
                    f"tp {found.parallel.tp}, ep {found.parallel.ep}).",
                    "Give another --output.",
                )
            return
        for path in source.auxiliary:
            replace_file(root / path.name, path.read_bytes())
        described = Model(
            family=source.family.name,
            architecture=source.family.architecture,
            source=source.repository or source.name,
            config_digest=source.config_digest,
            commit=source.commit,
            parameters=plan.parameters,
        )
        write_manifest(root, Manifest(format=FORMAT, tool=TOOL, model=described, parallel=Parallel(tp, ep)))


def compile_graphs(root: Path, target: str) -> list[Compiled]:
    """Make all phases for `target`, replacing what is there.  Proofs of other targets stay valid."""
    if target not in PHASES:
        raise UsageError(f"{target}: no such target.", f"Targets are: {', '.join(PHASES)}.")
    manifest = read_manifest(root)
    config = configuration(root, manifest)
    _check_heads(config, target)
    export = _export if config.layers <= LAYERS_AT_HOME else _export_apart
    with exclusive(root):
        manifest = read_manifest(root)
        mesh = Mesh(manifest.parallel.tp, manifest.parallel.ep)
        stored = manifest.weights.dtype if manifest.weights else ""  # unknown: float32, which any type becomes
        made: list[Compiled] = []
        for phase in PHASES[target]:
            started = time.monotonic()
            exported, mindspore, peak = export(config, mesh, target, phase, stored)
            graph = Graph(
                target=target,
                phase=phase,
                path=f"graphs/{target}/{phase}.mindir",
                size=len(exported.proto),
                digest=digest_bytes(exported.proto),
                mindspore=mindspore,
                nodes=exported.nodes,
                kinds=exported.kinds,
                inputs=exported.inputs,
                parameters=exported.parameters,
                groups=exported.groups,
                nz=exported.nz,
            )
            _check_weights(root, manifest, graph)
            path = root / graph.path
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, exported.proto)
            made.append(Compiled(graph, time.monotonic() - started, peak))
        others = [g for g in manifest.graphs if g.target != target]
        graphs = sorted([*others, *(m.graph for m in made)], key=lambda g: (g.target, g.phase))
        write_manifest(root, msgspec.structs.replace(manifest, graphs=graphs))
        took = {m.graph.path: Timing(m.graph.digest, round(m.seconds, 3)) for m in made}
        replace_file(root / STATE_DIR / TIMINGS, msgspec.json.encode({**timings(root), **took}))
    return made


def timings(root: Path) -> dict[str, Timing]:
    """What compiling took, by the graph's path, where that is known.  No part of what the artifact promises."""
    try:
        return msgspec.json.decode((root / STATE_DIR / TIMINGS).read_bytes(), type=dict[str, Timing])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return {}


def _export(
    config: DecoderConfig, mesh: Mesh, target: str, phase: Phase, stored: str
) -> tuple[Exported, str, int]:
    """(the graph, MindSpore's version, peak resident bytes)."""
    mindspore = mindspore_version()
    from .graph.export import export

    return export(config, mesh, target, phase, stored), mindspore, peak_rss_bytes()


def _export_apart(
    config: DecoderConfig, mesh: Mesh, target: str, phase: Phase, stored: str
) -> tuple[Exported, str, int]:
    """The same in a process of its own: MindSpore's front end keeps what it built, and three phases of a deep
    model would add up."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_export, config, mesh, target, phase, stored).result()
        except BrokenProcessPool:
            raise ResourceError(
                f"{target} {phase}: the process that compiled it was ended, most likely for want of memory.",
                "A model of 61 layers needs 2 GiB.",
            ) from None


def _check_heads(config: DecoderConfig, target: str) -> None:
    """Raises UsageError for heads that Ascend's attention cannot take.

    ATB's PagedAttention wants page size * head size <= 128 * 128 (hiascend.com, ascendtb_01_0075), which is a
    head of 1024 with SGLang's smallest pages of 16; rows must be aligned to 16 bytes.
    """
    if target == "cpu":
        return
    widths = {"head_dim": config.head_dim}
    if mla := config.mla:
        widths = {
            "qk_nope_head_dim": mla.nope,
            "qk_rope_head_dim": mla.rope,
            "v_head_dim": mla.v_dim,
            "kv_lora_rank + qk_rope_head_dim": mla.latent,
        }
    wrong = [f"{name} {width}" for name, width in widths.items() if width % 8 or width > 1024]
    if wrong:
        raise UsageError(
            f"{target}: its attention takes head sizes that are multiples of 8, up to 1024; this model has "
            f"{', '.join(wrong)}.",
            "Compile it for --target cpu.",
        )


def mindspore_version() -> str:
    """Raises EnvironmentProblem if mindspore is not installed."""
    try:
        import mindspore
    except ImportError as e:
        raise EnvironmentProblem(
            f"mindspore cannot be imported ({e}).", 'Install it: pip install "msconv[compile]".'
        ) from None
    return str(mindspore.__version__)


def unused_names(stored: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """Weights no graph reads, leaving out the rank constants that other targets need."""
    return sorted(set(stored) - set(wanted) - set(RANK_CONSTANTS))


def _check_weights(root: Path, manifest: Manifest, graph: Graph) -> None:
    """The graph's parameters are exactly the weights' tensors, shape by shape."""
    if manifest.weights is None:
        return
    stored = {t.name: t.shape for t in manifest.weights.tensors}
    wanted = {p.name: p.shape for p in graph.parameters}
    problems = [f"  {n}: needed by the graph, not among the weights" for n in wanted.keys() - stored.keys()]
    problems += [f"  {n}: among the weights, not used by the graph" for n in unused_names(stored, wanted)]
    problems += [
        f"  {n}: the graph wants {wanted[n]}, the weights have {stored[n]}"
        for n in wanted.keys() & stored.keys()
        if wanted[n] != stored[n]
    ]
    if problems:
        raise ArtifactError(
            f"{root}: weights and {graph.target} {graph.phase} graph do not fit:\n"
            + "\n".join(sorted(problems)[:20]),
            "Convert again with --force.",
        )
