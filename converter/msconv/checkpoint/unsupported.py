"""Checkpoints that are whole and cannot be converted: what they are, and what to take instead.  What is damaged is
told elsewhere, in other words: only that is mended by another download."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from msconv_runtime.errors import CheckpointError

from ..layout.names import fold, shorten
from ..quant.unsupported import INSTEAD

WHOLE = "The files are whole: downloading them again gives the same."
UNQUANTISED = f"{WHOLE}  Instead, {INSTEAD}."
EXAMPLES = 3  # names in a message


class UnsupportedCheckpoint(CheckpointError):
    """The checkpoint is whole, and of a kind that msconv does not read."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of checkpoint.  `sign`: a pattern in tensor names that only it has."""

    sign: re.Pattern[str]
    what: str
    hint: str


MERGE = (
    f"{WHOLE}  Merge the adapter into its base model first: with peft, "
    "model.merge_and_unload().save_pretrained(DIR), then convert DIR."
)
HEAD = f"{WHOLE}  Take the model that generates text, or save it without this head."
TEXT_ONLY = f"{WHOLE}  Only models of text are converted: save the language model by itself, or take another."

KINDS = (
    Kind(re.compile(r"\.lora_[AB]\.|\.lora_embedding_|\.base_layer\.|\.lora_magnitude"), "LoRA adapters", MERGE),
    Kind(re.compile(r"\.qzeros$|\.qweight$|\.g_idx$"), "weights quantised by GPTQ or AWQ", UNQUANTISED),
    Kind(
        re.compile(r"\.weight_packed$|\.weight_shape$|\.weight_zero_point$"),
        "weights packed by compressed-tensors",
        UNQUANTISED,
    ),
    Kind(re.compile(r"\.biases$"), "weights quantised by MLX (scales and biases of groups)", UNQUANTISED),
    Kind(
        re.compile(r"\.absmax$|\.quant_map$|\.quant_state\.|\.nested_absmax$|\.SCB$|\.weight_format$"),
        "weights quantised by bitsandbytes",
        UNQUANTISED,
    ),
    Kind(re.compile(r"_blocks$"), "experts in MXFP4", UNQUANTISED),
    Kind(
        re.compile(r"\.(input|output|k|v)_scale$|\.activation_scale$"),
        "FP8 with static scales of activations",
        UNQUANTISED,
    ),
    Kind(
        re.compile(r"\.weight_scale(_2)?$"),
        "FP8 or INT8 with a scale a tensor or a row, not a block",
        UNQUANTISED,
    ),
    Kind(
        re.compile(r"(^|\.)(v_head|value_head|reward_head|regression_head|score|classifier)\."),
        "a head for values or classes",
        HEAD,
    ),
    Kind(
        re.compile(r"(^|\.)(visual|vision_tower|vision_model|audio_tower|multi_modal_projector|mm_projector)\."),
        "a tower for images or sound",
        TEXT_ONLY,
    ),
)

ELEMENTS: Mapping[str, str] = {
    "F8_E8M0": "powers of two, scales of MX formats",
    "F4": "4 bits, of MXFP4 or NVFP4",
    "F6_E2M3": "6 bits, of MX formats",
    "F6_E3M2": "6 bits, of MX formats",
    "F8_E4M3FNUZ": "FP8 as AMD MI300 has it",
    "F8_E5M2FNUZ": "FP8 as AMD MI300 has it",
    "C64": "complex numbers",
}


def refuse_elements(where: str, name: str, code: str) -> None:
    """Raises UnsupportedCheckpoint for an element type that safetensors knows and msconv does not."""
    if code in ELEMENTS:
        raise UnsupportedCheckpoint(
            f"{where}: {shorten(name)}: element type {code} ({ELEMENTS[code]}) is not supported.", UNQUANTISED
        )


def refuse_names(where: str, names: Iterable[str]) -> None:
    """Raises UnsupportedCheckpoint for tensors whose names show a kind of checkpoint that is not read."""
    found: dict[str, tuple[Kind, list[str]]] = {}
    for name in names:
        for kind in KINDS:
            if kind.sign.search(name):
                found.setdefault(kind.what, (kind, []))[1].append(name)
                break
    if not found:
        return
    lines = [f"{where}: this checkpoint is of a kind that is not supported:"]
    for what, (_, bad) in found.items():
        folded = fold(bad)
        listed = ", ".join(shorten(n, 100) for n, _ in folded[:EXAMPLES])
        lines.append(f"  {what}: {listed}{', ...' if len(folded) > EXAMPLES else ''} ({len(bad)} tensors).")
    raise UnsupportedCheckpoint("\n".join(lines), next(iter(found.values()))[0].hint)


def refuse_embedding(where: str, files: Collection[str]) -> None:
    """Raises UnsupportedCheckpoint for a model of sentence-transformers that pools its last hidden states."""
    if any(name == "1_Pooling" or name.startswith("1_Pooling/") for name in files):
        raise UnsupportedCheckpoint(
            f"{where}: is an embedding model (it has 1_Pooling): an artifact computes the next token's logits, "
            "and no embeddings.",
            f"{WHOLE}  Serve it with SGLang itself (--is-embedding), or take a model that generates text.",
        )


def untied(where: str) -> UnsupportedCheckpoint:
    """The error for a body without the head that makes logits."""
    return UnsupportedCheckpoint(
        f"{where}: has no lm_head.weight, names without `model.` before them, and tie_word_embeddings is not "
        "true: it is the body of an embedding model, and computes no logits.",
        f"{WHOLE}  Take a model that generates text.",
    )


def weightless(files: Collection[str]) -> tuple[str, str] | None:
    """What a directory or repository holds instead of weights in safetensors: (what it has, what to do)."""
    endings = {"." + name.rpartition(".")[2] for name in files if "." in name}
    if "adapter_config.json" in files:
        return "a LoRA adapter (adapter_config.json), and no model", MERGE
    if ".gguf" in endings:
        return (
            "GGUF files, which are never read",
            f"{WHOLE}  GGUF is quantised for llama.cpp: take the repository in safetensors that it was made from.",
        )
    if {".npz", ".mlx"} & endings:
        return "weights for MLX", UNQUANTISED
    if pickles := sorted({".bin", ".pt", ".pth", ".ckpt"} & endings):
        return (
            f"{', '.join(pickles)} files, which are never read: a pickle can run code",
            "Weights are needed as safetensors: look for another revision, or, if you trust the file, load it "
            "with transformers and save_pretrained(DIR).",
        )
    if others := sorted({".h5", ".msgpack", ".onnx", ".ot", ".nemo"} & endings):
        return (
            f"{', '.join(others)} files, which are never read",
            "Weights are needed as safetensors: look for the repository of this model in PyTorch's form.",
        )
    return None
