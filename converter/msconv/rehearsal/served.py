"""What a server loads, read anew: the graphs and weights of a model, and of what drafts for it."""

from __future__ import annotations

from msconv_runtime.artifact import OF_TARGET, Artifact, Graph, digest_bytes
from msconv_runtime.mindir_check.allowed import TP_GROUP
from msconv_runtime.roles import ROLES, of_draft, of_model, of_variant
from msconv_runtime.targets import Target

from ..mindir.interpreter import Interpreter
from ..mindir.kernels import Context
from ..mindir.program import Program, parse
from ..verify.lockstep import in_lockstep
from ..verify.rank_files import RankFiles
from .protocol import graph_file
from .records import Rank

Loaded = dict[tuple[int, int], "tuple[Served, str]"]  # by rank, and as which of its graphs: whose it is, its role


class Served:
    """`target`: the model for which this one drafts, None if it is that model."""

    def __init__(self, artifact: Artifact, on: Target, exact: bool, target: Served | None = None) -> None:
        self.artifact, self.is_draft = artifact, target is not None
        listed = artifact.graphs(on.name)
        own = of_draft(listed) if self.is_draft else []
        self.graphs: dict[str, Graph] = of_variant(own or of_model(listed), "")
        paths = {role: artifact.root / g.path for role, g in self.graphs.items()}
        self.programs: dict[str, Program] = {role: parse(path) for role, path in paths.items()}
        context = Context(exact, next(iter(self.programs.values())).dtype)
        self.dtype, self.keep = context.dtype, context.keep(context.dtype)
        ranks = range(artifact.tp)
        self.files = [RankFiles(artifact, r, context, keep=True, as_bound=True) for r in ranks]
        if target is not None:
            self._borrow(target)
        self.interpreter = Interpreter(context, self.files, in_lockstep)
        self._digests = {
            digest: role
            for role, graph in self.graphs.items()
            for digest in (graph.digest, _digest_of_any_groups(paths[role].read_bytes()))
        }

    def _borrow(self, target: Served) -> None:
        """What the graphs take from their target's weights, by its names there."""
        for program in self.programs.values():
            for name, (declared, _) in program.declared.items():
                if name.startswith(OF_TARGET):
                    for own, its in zip(self.files, target.files, strict=True):
                        own.lend(name, its.get(name.removeprefix(OF_TARGET), declared))

    def role_of(self, rank: Rank, identity: str) -> str | None:
        """Which of these graphs it was that a rank loaded, None if none: but for the names of groups, it must be
        that file byte for byte."""
        if identity not in self._digests:
            data = (rank.directory / graph_file(identity)).read_bytes()
            if role := self._digests.get(_digest_of_any_groups(data)):
                self._digests[identity] = role
        return self._digests.get(identity)

    def name(self, role: str) -> str:
        """What the calls of a graph are called."""
        return f"draft {role}" if self.is_draft and not ROLES[role].is_draft else role


def find_loaded(rank: Rank, models: list[Served]) -> Loaded:
    """Whose graphs a rank loaded; those of nobody are left out.  A draft that is a copy of its target has the same
    graphs: the target's were loaded first."""
    found: Loaded = {}
    taken: set[tuple[int, str]] = set()
    for event in rank.of("graph"):
        for number, model in enumerate(models):
            role = model.role_of(rank, event["identity"])
            if role is not None and (number, role) not in taken:
                taken.add((number, role))
                found[rank.rank, event["number"]] = model, role
                break
    return found


def _digest_of_any_groups(data: bytes) -> str:
    """Bytes of a graph whose groups are all called the same, in one order of bytes."""
    from mindspore.train import mind_ir_pb2

    model = mind_ir_pb2.ModelProto.FromString(data)
    for attribute in (a for p in model.primitives for a in p.attribute if a.name == "group"):
        attribute.s = TP_GROUP.encode()
    return digest_bytes(model.SerializeToString(deterministic=True))
