"""How many tokens are guessed at a time: numbers that SGLang would start with, and end on later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..serving.flags import number

STEPS, BRANCHES = "--speculative-num-steps", "--speculative-eagle-topk"
DRAFTS = "--speculative-num-draft-tokens"
LEAST_BREADTH, BREADTH = "--speculative-ngram-min-bfs-breadth", "--speculative-ngram-max-bfs-breadth"
USUAL_BREADTH = 10  # SGLang's
OF_MODELS, OF_NGRAMS = (STEPS, BRANCHES, DRAFTS), (DRAFTS, LEAST_BREADTH, BREADTH)
LEAST = {STEPS: 1, BRANCHES: 1, DRAFTS: 2, LEAST_BREADTH: 1, BREADTH: 1}


def of_ngrams(given: Mapping[str, str], most: int) -> list[str]:
    """Why the table of n-grams cannot guess so many, each with what to do.  `most`: tokens that there is room for
    in the cache, 0 if nobody knows."""
    if wrong := list(_no_counts(given, OF_NGRAMS)):
        return wrong
    least, breadth = number(given, LEAST_BREADTH) or 1, number(given, BREADTH) or USUAL_BREADTH
    if least > breadth:
        return [f"{LEAST_BREADTH} {least}: is more than {BREADTH}, {breadth}.  Give at most {breadth}"]
    return list(_no_room(given, number(given, DRAFTS), most))


def of_model(given: Mapping[str, str], most: int) -> list[str]:
    """The same of a model or layer that guesses.  Of its three numbers SGLang takes all, or none."""
    if wrong := list(_no_counts(given, OF_MODELS)):
        return wrong
    steps, branches, drafts = (number(given, name) for name in OF_MODELS)
    if not (steps or branches or drafts):
        return []
    if not (steps and branches and (drafts or branches == 1)):
        lacking = [name for name in OF_MODELS if name not in given]
        some = " ".join(f"{name} {given[name]}" for name in OF_MODELS if name in given)
        return [f"{some}: needs {' and '.join(lacking)} too.  Give all three of them, or none"]
    guesses = branches + (steps - 1) * branches**2
    if branches > 1 and drafts - 1 > guesses:
        return [
            f"{DRAFTS} {drafts}: {STEPS} {steps} and {BRANCHES} {branches} make {guesses} guesses, one less than "
            f"are verified.  Give at most {guesses + 1}"
        ]
    return list(_no_room(given, max(steps * branches, drafts), most))


def _no_counts(given: Mapping[str, str], names: tuple[str, ...]) -> Iterator[str]:
    for name in (name for name in LEAST if name in given and name not in names):
        yield f"{name}: {' and '.join(names)} count here.  Leave it out"
    for name in names:
        if name in given and number(given, name) < LEAST[name]:
            told = f"{name} {given[name][:20]}".strip()
            yield f"{told}: is no whole number of at least {LEAST[name]}.  Give one"


def _no_room(given: Mapping[str, str], slots: int, most: int) -> Iterator[str]:
    """SGLang keeps so many `slots` of the cache free for each request, and would answer none."""
    if 0 < most < slots:
        some = " ".join(f"{name} {given[name]}" for name in OF_MODELS if name in given)
        yield f"{some}: each request needs {slots} tokens of the cache for them, there are {most}.  Give fewer"
