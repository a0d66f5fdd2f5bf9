"""The artifact: its format, its directory, its weights, and whether its bytes are what the manifest says.

Knows no model and no framework.
"""

from .codec import decode_manifest, encode_manifest
from .directory import (
    MANIFEST,
    READY,
    SIGNATURE,
    STATE_DIR,
    is_artifact,
    read_manifest,
    replace_file,
    sync_directory,
    write_manifest,
)
from .manifest import (
    FORMAT,
    Dropped,
    File,
    Graph,
    GraphInput,
    GraphOutput,
    GraphParameter,
    Manifest,
    Model,
    Padding,
    Parallel,
    Rehearsed,
    SourceFile,
    TensorEntry,
    Verified,
    WeightFile,
    Weights,
    digest_bytes,
    digest_of,
)
from .opened import Artifact

__all__ = [
    "FORMAT",
    "MANIFEST",
    "READY",
    "SIGNATURE",
    "STATE_DIR",
    "Artifact",
    "Dropped",
    "File",
    "Graph",
    "GraphInput",
    "GraphOutput",
    "GraphParameter",
    "Manifest",
    "Model",
    "Padding",
    "Parallel",
    "Rehearsed",
    "SourceFile",
    "TensorEntry",
    "Verified",
    "WeightFile",
    "Weights",
    "decode_manifest",
    "digest_bytes",
    "digest_of",
    "encode_manifest",
    "is_artifact",
    "read_manifest",
    "replace_file",
    "sync_directory",
    "write_manifest",
]
