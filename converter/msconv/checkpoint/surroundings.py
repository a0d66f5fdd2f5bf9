"""What stands around the weights: the directory's name, the tokenizer's files, shards that nothing names."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

CACHED = re.compile(r"models--(?:[^/]+?--)?(?P<name>[^/]+)")  # as huggingface_hub names a repository's directory
TOKENIZERS = ({"tokenizer.json"}, {"vocab.json", "merges.txt"}, {"tokenizer.model"})
WITH_CODE = re.compile(r"tiktoken\.model|tokenization_\w+\.py|.*\.tiktoken")


def model_name(root: Path) -> str:
    """The model's name: that of its directory, or of its repository if that is a snapshot in a hub's cache."""
    real = root.resolve()
    if real.parent.name == "snapshots" and (match := CACHED.fullmatch(real.parent.parent.name)):
        return match["name"]
    if "modelscope" in real.parts:
        return real.name.replace("___", ".")  # its client's spelling of a dot
    return real.name


def tokenizer_note(files: Collection[str]) -> str:
    """What to say of a tokenizer that a server cannot load without running code, "" if there is nothing to."""
    if any(needed <= set(files) for needed in TOKENIZERS):
        return ""
    found = sorted(name for name in files if WITH_CODE.fullmatch(name))
    if not found:
        return (
            "No tokenizer is here: the artifact will have none, and serves token ids only (--skip-tokenizer-init)."
        )
    return (
        f"The tokenizer is {', '.join(found)}: it needs code, which is never run or copied; the artifact will "
        "have no tokenizer. Make a tokenizer.json of it and put it into the artifact, or serve token ids only "
        "(--skip-tokenizer-init)."
    )


def unnamed_note(files: Collection[str], read: Collection[str]) -> str:
    """What to say of safetensors files that are not read, "" if all are."""
    others = sorted(n for n in files if n.endswith(".safetensors") and "/" not in n and n not in read)
    if not others:
        return ""
    listed = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
    return f"Not read, because no index names them: {listed}."
