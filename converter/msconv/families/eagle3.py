"""Drafts of EAGLE3: one layer that reads residual streams of its target, with a head over some of its tokens.

The embedding is the target's: a draft's artifact has none, and takes the rows that its target has in memory.
"""

from __future__ import annotations

from typing import Any

from msconv_runtime.artifact import D2T
from msconv_runtime.draft_kinds import LAYER_IDS, OBJECT
from msconv_runtime.draft_kinds.eagle3 import EAGLE3 as KIND

from ..layout.cuts import COPY, HEAD_COLS, VOCAB
from ..layout.model import Table
from ..layout.rules import Drop, Part, Rule, keep
from .blocks import gated_mlp, qkv
from .config import DraftFor, Family, Reader, show
from .keys import COMMON, Off

LAYER = "midlayer."


def read(r: Reader, layers: int) -> dict[str, Any]:
    """What the published drafts have in common; the variants that SGLang knows besides are refused."""
    if layers != 1:
        r.problems.append(f"num_hidden_layers {layers}: a draft of one layer is supported")
    if r.flag("attention_bias", False):
        r.problems.append("attention_bias is true: not supported in a draft")
    if r.flag("tie_word_embeddings", False):
        r.problems.append("tie_word_embeddings is true: a draft needs a head of its own")
    hidden = r.raw.get("hidden_size")
    if r.raw.get("target_hidden_size", hidden) != hidden:
        r.problems.append(
            f"target_hidden_size {show(r.raw['target_hidden_size'])}, hidden_size {show(hidden)}: only a draft as "
            "wide as its target is supported"
        )
    ids = _layer_ids(r)
    captured = r.whole("num_aux_hidden_states", len(ids) or 3, most=64)
    return {
        "qk_norm": False,
        "vocab": r.whole("draft_vocab_size"),
        "drafts_for": DraftFor(KIND, r.whole("vocab_size"), captured, ids),
    }


def _layer_ids(r: Reader) -> tuple[int, ...]:
    """The layers of `eagle_config`, (): it names none."""
    found = r.raw.get(OBJECT)
    if found is None:
        return ()
    if not isinstance(found, dict):
        r.problems.append(f"{OBJECT} = {show(found)}: an object is needed")
        return ()
    inner = Reader(found, f"{OBJECT}.")
    if not inner.flag("use_aux_hidden_state", True):
        inner.problems.append(f"{OBJECT}.use_aux_hidden_state is false: a draft without residual streams")
    if others := sorted(found.keys() - {LAYER_IDS, "use_aux_hidden_state"}):
        inner.problems.append(f"{OBJECT} has {', '.join(map(show, others))}: not supported")
    ids = found.get(LAYER_IDS) or []
    if not isinstance(ids, list) or any(type(i) is not int or not 0 <= i < 4096 for i in ids):
        inner.problems.append(f"{OBJECT}.{LAYER_IDS} = {show(ids)}: numbers of layers are needed")
        ids = []
    count = r.raw.get("num_aux_hidden_states")
    if ids and count is not None and count != len(ids):
        inner.problems.append(f"num_aux_hidden_states {show(count)}, and {LAYER_IDS} names {len(ids)} layers")
    r.problems += inner.problems
    return tuple(ids)


TABLE = Table(
    (
        keep("fc.weight", ("hidden", "streams"), COPY),
        keep(LAYER + "hidden_norm.weight", ("hidden",), COPY),
        keep(LAYER + "input_layernorm.weight", ("hidden",), COPY),
        qkv("weight", "both", prefix=LAYER + "self_attn."),
        keep(LAYER + "self_attn.o_proj.weight", ("hidden", "q"), HEAD_COLS),
        keep(LAYER + "post_attention_layernorm.weight", ("hidden",), COPY),
        *gated_mlp(LAYER + "mlp.", "ffn"),
        keep("norm.weight", ("hidden",), COPY),
        keep("lm_head.weight", ("vocab", "hidden"), VOCAB, as_values=True),
        Rule(D2T, (Part(D2T, ("vocab",), COPY),), dtype="int32", optional=True),
    ),
    (
        Drop("t2d", "says of the target's tokens which of them d2t reaches: d2t says that too"),
        Drop("embed_tokens.weight", "SGLang drafts with the target's embedding"),
        Drop("midlayer.self_attn.rotary_emb.inv_freq", "rotary buffer, computed from the configuration"),
    ),
)

KEYS = COMMON.plus(
    f"draft_vocab_size target_hidden_size num_aux_hidden_states {OBJECT}",
    {"modules": "which classes its training has made", "speculative_config": "its training's"},
)
VARIANTS = dict.fromkeys(
    ("norm_before_fc", "fc_norm", "use_aux_norm", "norm_output", "norm_before_residual", "bias"),
    Off("a variant of EAGLE3"),
)

EAGLE3 = Family(
    name=KIND.name,
    architecture="LlamaForCausalLMEagle3",
    table=TABLE,
    read=read,
    keys=KEYS.without(VARIANTS),
    aliases=("llama",),
    other_names=(("layers.0.", LAYER),),
)
