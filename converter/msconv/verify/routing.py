"""How close a router was to choosing other experts: what tells a tie from an error."""

from __future__ import annotations

from typing import Any

from ..families.config import Moe


def closeness(logits: Any, moe: Moe, bias: Any | None) -> Any:
    """Smallest distance, in scores, between what was chosen and what came next.  Router logits [T, E] -> [T].

    Softmax keeps the order of the logits, so those are looked at; sigmoid routing looks at score + bias, and at
    the sums of each group's best two.
    """
    if moe.scoring == "softmax":
        return _gap(logits, moe.top_k)
    choice = logits.sigmoid() + (0 if bias is None else bias)
    if moe.top_groups == moe.groups:
        return _gap(choice, moe.top_k)
    grouped = choice.reshape(len(choice), moe.groups, -1)
    scores = grouped.topk(2, -1)[0].sum(-1)
    kept = scores.topk(moe.top_groups, -1)[1]
    best = grouped.gather(1, kept[:, :, None].expand(-1, -1, grouped.shape[2])).reshape(len(choice), -1)
    return _gap(best, moe.top_k).minimum(_gap(scores, moe.top_groups) / 2)  # a sum moves by two scores


def _gap(scores: Any, count: int) -> Any:
    """The distance between the last that is taken and the first that is not."""
    if count >= scores.shape[1]:
        return scores.new_full((len(scores),), float("inf"))
    best = scores.topk(count + 1, -1)[0]
    return best[:, count - 1] - best[:, count]
