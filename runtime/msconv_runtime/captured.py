"""Which layers of a model a draft of EAGLE3 reads, and how its config.json says so."""

from __future__ import annotations

from collections.abc import Sequence

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"  # in a draft's config.json, under `eagle_config`


def captured_layers(layers: int, ids: Sequence[int] | None) -> list[int]:
    """The layers whose inputs are read, ascending.  `ids`: of the layers whose outputs those are, as a draft's
    config.json has them; without them, SGLang's three of a model of `layers` layers."""
    chosen = [i + 1 for i in ids] if ids else [2, layers // 2, layers - 3]
    return sorted(set(chosen))
