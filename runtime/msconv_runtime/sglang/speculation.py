"""Speculative decoding: what its flags ask of an artifact and of a second one that drafts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..artifact import Artifact, is_artifact
from ..errors import MsconvError
from ..kv_pool import usual_pool
from ..roles import gives_all_logits
from ..serving.flags import number
from ..targets import Target
from .accepted import EAGLE

ALGORITHM = "--speculative-algorithm"
DRAFT_PATHS = ("--speculative-draft-model-path", "--speculative-draft-model")
BRANCHES, BREADTH = "--speculative-eagle-topk", "--speculative-ngram-max-bfs-breadth"
USUAL_BREADTH = 10  # SGLang's
PAGE = "--page-size"
NGRAM, STANDALONE = "NGRAM", "STANDALONE"
READ_HIDDEN = ("EAGLE", "EAGLE3", "NEXTN", "FROZEN_KV_MTP")
MOST = 3  # damaged files that are named
TOKENIZER = "tokenizer.json"


def draft_path(given: Mapping[str, str]) -> str:
    """The second artifact that the user's flags name, or ""."""
    return next((given[name] for name in DRAFT_PATHS if name in given), "")


def drafts(given: Mapping[str, str]) -> list[Artifact]:
    """The same, opened, if it can be."""
    try:
        return [Artifact(Path(path))] if (path := draft_path(given)) and ALGORITHM in given else []
    except MsconvError:
        return []


def speculation_problems(artifact: Artifact, target: Target, given: Mapping[str, str]) -> list[str]:
    """Why drafts cannot be made, or not be verified by the artifact's graphs, each with what to do."""
    if ALGORITHM not in given:
        alone = next((name for name in DRAFT_PATHS if name in given), "")
        return (
            [f"{alone}: asks for nothing without {ALGORITHM} {STANDALONE}.  Give both, or none"] if alone else []
        )
    asked = f"{ALGORITHM} {given[ALGORITHM][:40]}".strip()
    name = given[ALGORITHM].upper()
    if name in READ_HIDDEN:
        return [f"{asked}: {EAGLE}.  {NGRAM} and {STANDALONE} are served"]
    if name not in (NGRAM, STANDALONE):
        return [f"{asked}: {NGRAM} and {STANDALONE} are served.  Give one of them"]
    found = _no_logits(asked, artifact, target)
    return found + list((_of_ngram if name == NGRAM else _of_standalone)(asked, artifact, target, given))


def speculation_notes(target: Target, given: Mapping[str, str]) -> list[str]:
    """What a user must know of SGLang's own speculative decoding before it starts."""
    if ALGORITHM not in given or not target.device.is_host:
        return []
    return [
        f"{ALGORITHM}: on a CPU SGLang verifies drafts greedily: a request's temperature, top_p, top_k and min_p "
        "count for its first token only."
    ]


def _no_logits(asked: str, artifact: Artifact, target: Target) -> list[str]:
    if gives_all_logits(artifact.graphs(target.name)):
        return []
    return [
        f"{asked}: {artifact.root} has no graphs that give the logits of all tokens.  "
        f"`msconv compile {artifact.root} --target {target.name}` adds them"
    ]


def _of_ngram(asked: str, artifact: Artifact, target: Target, given: Mapping[str, str]) -> Iterator[str]:
    if not target.device.is_host:
        yield f"{asked}: SGLang 0.5.23 has it for no NPU.  Leave the flag out"
        return
    branches = number(given, BREADTH) or USUAL_BREADTH
    page = number(given, PAGE) or usual_pool(artifact, target).page
    if branches > 1 and page > 1:
        yield (
            f"{asked}: drafts that branch ({BREADTH} {branches}) need pages of one token, these have {page}.  "
            f"Give {PAGE} 1, or {BREADTH} 1"
        )
    lacking = [tool for tool in (os.environ.get("CXX") or "c++", "ninja") if shutil.which(tool) is None]
    if lacking:
        yield f"{asked}: SGLang compiles a part of it at the start.  Install {' and '.join(lacking)}"


def _of_standalone(asked: str, artifact: Artifact, target: Target, given: Mapping[str, str]) -> Iterator[str]:
    path = draft_path(given)
    if not path:
        yield f"{asked}: needs a draft.  Give {DRAFT_PATHS[0]} ARTIFACT"
        return
    flag = f"{DRAFT_PATHS[0]} {path}"
    if number(given, BRANCHES) > 1:
        yield f"{BRANCHES} {given[BRANCHES]}: a draft's tokens follow one another.  Give {BRANCHES} 1"
    if not is_artifact(path):
        yield f"{flag}: is no artifact.  `msconv convert --model {path} --output DIR` makes one"
        return
    from ..artifact.integrity import check_graphs  # needs numpy

    try:
        draft = Artifact(Path(path))
        if damage := check_graphs(draft):
            yield from (f"{flag}: {d.path}: {d.problem}.  Copy it again" for d in damage[:MOST])
            return
        draft.graphs(target.name)
        yield from _no_logits(asked, draft, target)
        yield from (f"{flag}: {problem}" for problem in differences(artifact, draft))
    except MsconvError as e:
        yield f"{flag}: {e.message.removeprefix(f'{path}: ')}  {e.hint}"


def differences(artifact: Artifact, draft: Artifact) -> Iterator[str]:
    """Why an artifact cannot draft for another one, each with what to do."""
    ours, its = artifact.manifest.parallel, draft.manifest.parallel
    if (its.tp, its.ep) != (ours.tp, ours.ep):
        yield (
            f"is for tp {its.tp}, ep {its.ep}, its target for tp {ours.tp}, ep {ours.ep}.  "
            f"`msconv reshard {draft.root} --tp {ours.tp} --output DIR` makes another"
        )
    sizes = [json.loads(a.config_bytes()).get("vocab_size") for a in (artifact, draft)]
    if sizes[0] != sizes[1]:
        yield f"has a vocabulary of {sizes[1]} tokens, its target one of {sizes[0]}.  {OTHER}"
    elif (first := _first_difference(artifact.root, draft.root)) is not None:
        yield f"has another tokenizer than its target: {first}.  {OTHER}"


OTHER = "Give a draft of the same family, with the target's vocabulary"


def _first_difference(root: Path, other: Path) -> str | None:
    """A token that two tokenizers number differently; None if there is none, or one has no tokenizer."""
    ours, its = _tokens(root), _tokens(other)
    if ours is None or its is None or ours == its:
        return None
    token = next(t for t in [*ours, *its] if ours.get(t) != its.get(t))
    return f"{token[:40]!r} is {its.get(token, 'absent')} there, {ours.get(token, 'absent')} here"


def _tokens(root: Path) -> dict[str, int] | None:
    """Every token of a fast tokenizer, with its number; None if there is no such file."""
    try:
        data: dict[str, Any] = json.loads((root / TOKENIZER).read_bytes())
        listed = data["model"]["vocab"]
        added = {str(t["content"]): int(t["id"]) for t in data.get("added_tokens") or []}
        numbered = listed if isinstance(listed, dict) else {str(t[0]): i for i, t in enumerate(listed)}
        return {**numbered, **added}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
