"""Speculative decoding: what its flags ask of an artifact and of a second one that drafts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..artifact import Artifact, is_artifact
from ..draft_kinds import DRAFT_KINDS, LAYER_IDS, OBJECT, OF_CHECKPOINTS, OF_LAYERS, DraftKind
from ..errors import MsconvError
from ..kv_pool import usual_pool
from ..roles import gives_all_logits, of_draft
from ..serving.flags import number
from ..targets import Target
from .draft_counts import BRANCHES, BREADTH, LEAST, USUAL_BREADTH, of_model, of_ngrams

ALGORITHM = "--speculative-algorithm"
DRAFT_PATHS = ("--speculative-draft-model-path", "--speculative-draft-model")
PAGE, TOKENS = "--page-size", "--max-total-tokens"
RETURNED = ("--enable-return-hidden-states", "--return-hidden-states-mode")
NGRAM, STANDALONE = "NGRAM", "STANDALONE"
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
        alone = next((name for name in (*DRAFT_PATHS, *LEAST) if name in given), "")
        with_ = f"{ALGORITHM} {STANDALONE}" if alone in DRAFT_PATHS else ALGORITHM
        return [f"{alone}: asks for nothing without {with_}.  Give both, or none"] if alone else []
    asked = f"{ALGORITHM} {given[ALGORITHM][:40]}".strip()
    kind = KINDS.get(given[ALGORITHM].upper())
    if kind is None:
        return [f"{asked}: {', '.join(list(KINDS)[:-1])} and {list(KINDS)[-1]} are served.  Give one of them"]
    return _no_logits(asked, artifact, target) + list(kind(asked, artifact, target, given))


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


def gives_hidden(artifact: Artifact, target: Target) -> bool:
    """Whether the model's graphs give what its head reads, of every token: where a layer of its own drafts.  What
    other drafts read is something else."""
    draft = artifact.manifest.draft
    return draft is not None and not draft.layers and bool(of_draft(artifact.graphs(target.name)))


def hidden_problems(artifact: Artifact, target: Target, given: Mapping[str, str]) -> list[str]:
    """Why hidden states cannot be answered with."""
    flag = next((name for name in RETURNED if name in given), "")
    if given.get(flag) == "last":
        return [f"{flag} last: SGLang 0.5.23 takes no request for the last one alone.  Give {flag} full"]
    if not flag or gives_hidden(artifact, target):
        return []
    return [
        f"{flag}: the graphs of {artifact.root} give logits, no hidden states of their last norm.  Leave the flag "
        "out; graphs of a checkpoint with a layer for multi-token prediction give them"
    ]


def _of_ngram(asked: str, artifact: Artifact, target: Target, given: Mapping[str, str]) -> Iterator[str]:
    if not target.device.is_host:
        yield f"{asked}: SGLang 0.5.23 has it for no NPU.  Leave the flag out"
        return
    if path := draft_path(given):
        yield f"{DRAFT_PATHS[0]} {path}: {asked} drafts without a model.  Leave the flag out, or give {STANDALONE}"
    if wrong := of_ngrams(given, _room(artifact, target, given)):
        yield from wrong
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
    yield from _branches(artifact, target, given)
    yield from _of_other(asked, given, lambda draft: _a_model(asked, artifact, draft, target))


def _of_kinds(asked: str, artifact: Artifact, target: Target, given: Mapping[str, str]) -> Iterator[str]:
    """Of what reads hidden states: checkpoints of their own, where one is named or there is nothing else."""
    yield from _branches(artifact, target, given)
    algorithm = given[ALGORITHM].upper()
    kinds = [kind for kind in DRAFT_KINDS.values() if algorithm in kind.algorithms]
    layers = [kind for kind in kinds if kind.is_layer]
    if not layers or (len(layers) < len(kinds) and draft_path(given)):
        yield from _of_other(asked, given, lambda draft: _a_draft(algorithm, artifact, draft, target))
    else:
        yield from _of_layer(asked, artifact, target, given, layers)


def _of_layer(
    asked: str, artifact: Artifact, target: Target, given: Mapping[str, str], kinds: Sequence[DraftKind]
) -> Iterator[str]:
    if (path := draft_path(given)) and Path(path).resolve() != artifact.root.resolve():
        others = dict.fromkeys([kind.algorithms[-1] for kind in OF_CHECKPOINTS.values()])
        yield (
            f"{DRAFT_PATHS[0]} {path}: with {asked} the artifact drafts by itself.  Leave the flag out, or give "
            f"{' or '.join([*others, STANDALONE])}"
        )
    if not of_draft(artifact.graphs(target.name)):
        yield (
            f"{asked}: {artifact.root} has no graphs that draft.  Convert and compile a checkpoint that has its "
            f"layer for {' or '.join(kind.title for kind in kinds)}, or give {NGRAM}"
        )


def _branches(artifact: Artifact, target: Target, given: Mapping[str, str]) -> Iterator[str]:
    """Of what a draft model guesses: numbers, and SGLang's attention for NPUs has no pages that would do."""
    if wrong := of_model(given, _room(artifact, target, given)):
        yield from wrong
        return
    if number(given, BRANCHES) <= 1:
        return
    asked = f"{BRANCHES} {given[BRANCHES]}"
    page = number(given, PAGE) or usual_pool(artifact, target).page
    if not target.device.is_host:
        yield f"{asked}: on an NPU a draft's tokens follow one another.  Give {BRANCHES} 1"
    elif page > 1:
        yield f"{asked}: drafts that branch need pages of one token, these have {page}.  Give {PAGE} 1"


def _room(artifact: Artifact, target: Target, given: Mapping[str, str]) -> int:
    """The tokens of the KV pool, 0 where a server fills its device's memory with it."""
    return number(given, TOKENS) or usual_pool(artifact, target).tokens


def _of_other(asked: str, given: Mapping[str, str], judge: Callable[[Artifact], Iterator[str]]) -> Iterator[str]:
    """Of drafts that are artifacts of their own; `judge` sees one that can be opened and is whole."""
    path = draft_path(given)
    if not path:
        yield f"{asked}: needs a draft.  Give {DRAFT_PATHS[0]} ARTIFACT"
        return
    flag = f"{DRAFT_PATHS[0]} {path}"
    if not is_artifact(path):
        yield f"{flag}: is no artifact here.  `msconv convert --model {path} --output DIR` makes one"
        return
    from ..artifact.integrity import check_graphs  # needs numpy

    try:
        draft = Artifact(Path(path))
        if damage := check_graphs(draft):
            yield from (f"{flag}: {d.path}: {d.problem}.  Copy it again" for d in damage[:MOST])
            return
        yield from (problem if problem.startswith(asked) else f"{flag}: {problem}" for problem in judge(draft))
    except MsconvError as e:
        yield f"{flag}: {e.message.removeprefix(f'{path}: ')}  {e.hint}"


def _a_model(asked: str, artifact: Artifact, draft: Artifact, target: Target) -> Iterator[str]:
    draft.graphs(target.name)
    if draft.is_draft:
        yield f"reads hidden states.  Give {ALGORITHM} {draft.draft_kind.algorithms[-1]}"
        return
    yield from _no_logits(asked, draft, target)
    yield from differences(artifact, draft)


def _a_draft(algorithm: str, artifact: Artifact, draft: Artifact, target: Target) -> Iterator[str]:
    draft.graphs(target.name)
    if not draft.is_draft:
        yield f"is a model by itself, and no draft of {algorithm}.  Give {ALGORITHM} {STANDALONE}"
        return
    if algorithm not in (kind := draft.draft_kind).algorithms:
        yield f"is a draft of {kind.title}.  Give {ALGORITHM} {kind.algorithms[-1]}"
        return
    yield from differences(artifact, draft)
    own, its = (json.loads(a.config_bytes()) for a in (artifact, draft))
    if own["hidden_size"] != its["hidden_size"]:
        yield (
            f"reads hidden states of {its['hidden_size']} values, its target has {own['hidden_size']}.  Give a "
            "draft that was made for this model"
        )
        return
    read = kind.captured(own["num_hidden_layers"], (its.get(OBJECT) or {}).get(LAYER_IDS))
    given = artifact.manifest.draft
    if given is not None and given.is_layer:
        yield (
            f"is another draft than {artifact.root} has: its graphs give what its own layer reads.  Give "
            f"{ALGORITHM} {DRAFT_KINDS[given.kind].algorithms[-1]}, or convert the model with --no-drafts"
        )
    elif given is None or given.layers != read:
        has = f"hidden states of the layers {given.layers}" if given else "no hidden states"
        yield (
            f"reads the layers {read}, and {artifact.root} gives {has}.  `msconv compile {artifact.root} --target "
            f"{target.name} --draft {draft.root}` makes graphs for it"
        )


KINDS: dict[str, Callable[[str, Artifact, Target, Mapping[str, str]], Iterator[str]]] = {
    NGRAM: _of_ngram,
    STANDALONE: _of_standalone,
    **{name: _of_kinds for kind in [*OF_LAYERS.values(), *OF_CHECKPOINTS.values()] for name in kind.algorithms},
}


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
