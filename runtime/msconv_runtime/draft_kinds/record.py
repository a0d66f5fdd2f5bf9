"""What a kind of draft is: what guesses further tokens for a model, from its hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

OBJECT, LAYER_IDS = (
    "eagle_config",
    "eagle_aux_hidden_state_layer_ids",
)  # where SGLang looks in a draft's config.json


@dataclass(frozen=True)
class DraftKind:
    """A kind of draft: a layer among the model's own weights, or a checkpoint of its own, for one model.

    `name`: in manifests; the modules of msconv.graph and msconv.verify that have its graphs and its reference, and
    the family of its checkpoints, have the same.  `title`: in messages.  `algorithms`: SGLang's names of how such
    drafts are asked; messages say the last.  `suffix`: how SGLang ends an architecture's name where it means the
    layer that drafts; "" for checkpoints of their own.  `usual_layers`: of a model of so many layers, those whose
    inputs are read where a draft's config.json names none; none at all for what the model's head reads.
    """

    name: str
    title: str
    algorithms: tuple[str, ...]
    suffix: str = ""
    usual_layers: Callable[[int], Sequence[int]] = lambda _layers: ()

    @property
    def is_layer(self) -> bool:
        """Whether it is a layer among the model's own weights."""
        return bool(self.suffix)

    def captured(self, layers: int, ids: Sequence[int] | None) -> list[int]:
        """The layers whose inputs are read, ascending, of a model of `layers` layers.  `ids`: of the layers whose
        outputs those are, as a draft's config.json has them."""
        return sorted({i + 1 for i in ids} if ids else set(self.usual_layers(layers)))
