"""The keys of config.json: closed lists of those that are obeyed, those that change nothing, and those whose value
must be the one that changes nothing.  Every other key is refused by name: it may change what a model computes.

Sources of the names: the published configurations, and what transformers 5.19, SGLang 0.5.23 and vLLM read of a
configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

TRAINING = "training only"
TOKENS = "ids of special tokens, for the tokenizer and for sampling"
SAMPLING = "a default of sampling, which the server does"
OUTPUTS = "which values a Python model returns, or how it keeps them"
ORIGIN = "where the file comes from"
CODE = "names Python code, which is never run"
LABELS = "names of classes, for models that classify"
PLACEMENT = "how a server spreads the model, which --tp and --ep say here"

HARMLESS: Mapping[str, str] = {
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop"), TRAINING),
    **dict.fromkeys(("initializer_range", "aux_loss_alpha", "seq_aux", "router_aux_loss_coef"), TRAINING),
    **dict.fromkeys(("output_router_logits", "pretraining_tp", "use_bfloat16"), TRAINING),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"), TOKENS),
    **dict.fromkeys(("decoder_start_token_id", "tokenizer_class", "forced_bos_token_id"), TOKENS),
    **dict.fromkeys(("forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"), SAMPLING),
    **dict.fromkeys(("max_length", "min_length", "do_sample", "early_stopping", "temperature"), SAMPLING),
    **dict.fromkeys(("top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty"), SAMPLING),
    **dict.fromkeys(("num_beams", "num_beam_groups", "diversity_penalty", "num_return_sequences"), SAMPLING),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"), SAMPLING),
    **dict.fromkeys(("remove_invalid_values", "exponential_decay_length_penalty"), SAMPLING),
    **dict.fromkeys(("use_cache", "return_dict", "return_dict_in_generate", "output_scores"), OUTPUTS),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "torchscript"), OUTPUTS),
    **dict.fromkeys(("chunk_size_feed_forward", "attn_implementation", "_attn_implementation"), OUTPUTS),
    **dict.fromkeys(("_attn_implementation_autoset", "_experts_implementation"), OUTPUTS),
    **dict.fromkeys(("transformers_version", "_name_or_path", "name_or_path", "_commit_hash"), ORIGIN),
    **dict.fromkeys(("unsloth_version", "unsloth_fixed", "model_name", "license"), ORIGIN),
    **dict.fromkeys(("auto_map", "custom_pipelines"), CODE),
    **dict.fromkeys(("id2label", "label2id", "problem_type", "finetuning_task"), LABELS),
    **dict.fromkeys(("task_specific_params", "prefix", "num_labels"), LABELS),
    **dict.fromkeys(("ep_size", "base_model_tp_plan", "base_model_pp_plan"), PLACEMENT),
    "torch_dtype": "the element types in the files decide, and --dtype",
    "dtype": "the element types in the files decide, and --dtype",
}

Values = tuple[object, ...]
PARTIAL = "a part of the head that is not rotated"
NOTHING: Values = (None, False, 0)
ONE: Values = (None, 1)


@dataclass(frozen=True, slots=True)
class Off:
    """A part of a computation that no graph here has.  `values`: those that switch it off."""

    what: str
    values: Values = NOTHING


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


OBEYED = _names(
    """architectures model_type hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    intermediate_size vocab_size rms_norm_eps max_position_embeddings tie_word_embeddings attention_bias hidden_act
    rope_theta rope_scaling rope_parameters quantization_config"""
)


def _off(what: str, keys: str, values: Values = NOTHING) -> dict[str, Off]:
    return dict.fromkeys(keys.split(), Off(what, values))


OFF: Mapping[str, Off] = {
    **_off("attention in chunks", "dual_chunk_attention_config attention_chunk_size attn_config"),
    **_off(
        "logits with a soft cap",
        "attn_logit_softcapping final_logit_softcapping attn_logit_softcap final_logit_softcap logit_softcap "
        "logits_soft_cap router_logit_softcapping",
    ),
    **_off("attention with another scale", "query_pre_attn_scalar attention_multiplier attn_temperature_tuning"),
    **_off("attention with another scale", "attn_scale floor_scale attention_value_scale"),
    **_off("attention with sinks", "learnable_sink add_full_attention_sink_bias add_swa_attention_sink_bias"),
    **_off("values that are scaled", "residual_multiplier embedding_multiplier logits_scaling logit_scale", ONE),
    **_off("values that are scaled", "scale_emb scale_depth dim_model_base mup_width_multiplier", ONE),
    **_off("values that are clipped", "clip_qkv swiglu_limit swiglu_alpha"),
    **_off("a bias", "mlp_bias qkv_bias attention_out_bias use_bias lm_head_bias"),
    **_off("another norm", "use_qk_norm qk_layernorm add_qk_norm", (None, True)),
    **_off("attention to later tokens", "is_causal", (None, True)),
    **_off("attention to later tokens", "use_bidirectional_attention is_prefix_lm"),
    **_off(PARTIAL, "partial_rotary_factor rotary_pct", ONE),
    **_off("layers without rotation", "use_mla_nope mla_nope no_rope_layers no_rope_layer_interval nope_layers"),
    **_off("another rotation in some layers", "rope_local_base_freq swa_rope_theta use_mrope mrope_section"),
    **_off("other layers than attention", "full_attention_interval layers_block_type linear_attn_config"),
    **_off("other layers than attention", "hybrid_layer_pattern linear_num_value_heads block_configs"),
    **_off("sparse attention", "sparse_attention_config compress_ratios num_hash_layers indexer_types"),
    **_off("sparse attention", "index_topk index_n_heads index_head_dim index_topk_freq index_topk_pattern"),
    **_off("layers that run several times", "num_loops loop_num", (None, 0, 1)),
    **_off("hyper-connections", "mhc hc_mult", (None, 0, 1)),
    **_off("an encoder or cross attention", "is_encoder_decoder add_cross_attention cross_attention_hidden_size"),
    **_off("an encoder or cross attention", "tie_encoder_decoder encoder_layers"),
    **_off("heads that were removed", "pruned_heads", (None, {})),
    **_off("images or sound", "vision_config audio_config text_config thinker_config"),
    **_off("compressed weights", "compression_config quantization sparsity_config"),
    **_off("another shared expert", "shared_expert_intermediate_size fused_shared_experts_scaling_factor"),
    **_off("weights applied before an expert", "apply_router_weight_on_input"),
    **_off("adapters", "peft_config lora_config"),
    "is_decoder": Off("another kind of model", (None, False, True)),
}


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one family.  A key in `obeyed` is read; one in `harmless` is not, for the reason given; one in
    `off` must have a value that switches it off."""

    obeyed: frozenset[str] = OBEYED
    harmless: Mapping[str, str] = field(default_factory=lambda: HARMLESS)
    off: Mapping[str, Off] = field(default_factory=lambda: OFF)

    def plus(self, obeyed: str = "", harmless: Mapping[str, str] | None = None) -> Keys:
        """These and more, which one family reads.  `obeyed`: names with spaces between them."""
        return replace(
            self, obeyed=self.obeyed | set(obeyed.split()), harmless={**self.harmless, **(harmless or {})}
        )

    def without(self, parts: Mapping[str, Off]) -> Keys:
        """These, and more parts that one family's graphs do not have."""
        return replace(self, off={**self.off, **parts})


@dataclass(frozen=True, slots=True)
class Unknown:
    """Keys that were found and are on no list.  `active`: those that switch on what no graph has."""

    names: tuple[str, ...] = ()
    active: tuple[tuple[str, str], ...] = ()


def check(raw: Mapping[str, object], keys: Keys, prefix: str = "") -> Unknown:
    """Hold the keys of a JSON object against a family's lists.  `prefix` comes before the names that are given."""
    unknown, active = [], []
    for key, value in raw.items():
        if key in keys.obeyed or key in keys.harmless:
            continue
        off = keys.off.get(key)
        if off is None:
            unknown.append(prefix + key)
        elif not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in off.values):
            active.append((prefix + key, off.what))
    return Unknown(tuple(unknown), tuple(active))


def joined(found: Iterable[Unknown]) -> Unknown:
    """What several objects have, as one."""
    found = list(found)
    return Unknown(tuple(n for u in found for n in u.names), tuple(a for u in found for a in u.active))


SLIDING = "use_sliding_window sliding_window max_window_layers layer_types"

COMMON = Keys().plus(SLIDING)

ROPE_COMMON = "rope_type type rope_theta"
YARN = """factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim
    truncate"""
ROPE: Mapping[str, Keys] = {
    kind: Keys(_names(f"{ROPE_COMMON} {names}"), {}, _off(PARTIAL, "partial_rotary_factor", ONE))
    for kind, names in {"default": "", "linear": "factor", "yarn": YARN}.items()
}
ROPE_OTHERS: Mapping[str, str] = {
    "attn_factor": "SGLang and vLLM multiply by it, transformers does not: the proof could not see it",
    "extrapolation_factor": "SGLang and vLLM obey it, transformers does not: the proof could not see it",
    "full_attention": "rope parameters by layer type are not supported",
    "sliding_attention": "rope parameters by layer type are not supported",
    "mrope_section": "rotation along several axes is not supported",
}
