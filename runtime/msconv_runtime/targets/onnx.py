"""ONNX: files that runtimes of other people take."""

from __future__ import annotations

from .record import Form, Paging, Target

ONNX_FILE = "model.onnx"  # the graph for any shape, under the name that others look for
GENAI_CONFIG = "genai_config.json"
STATIC = "static"  # the variant with fixed shapes and plain operators

FILES = Form(
    place="{name}.onnx",  # in the artifact's root: what a file points at must lie beside it or below
    names={"mixed": ONNX_FILE.removesuffix(".onnx")},
    package="onnx",
    extra="onnx",
    check="onnx_check",
    export="onnx.export",
    run="onnx.candidates",
    beside=(GENAI_CONFIG,),
    points_at_weights=True,
    returns_caches=True,
)
ONNX = Target(
    name="onnx",
    kind="onnx",
    dtype="float32",
    graphs=(("mixed", ""), ("prefill", STATIC), ("decode", STATIC)),
    asked=(STATIC,),
    operations="onnx",
    paging=Paging(slots=1),
    epsilon=2**-24,
    rounds_weights=False,
    prefill_reads_cache=True,
    form=FILES,
)
