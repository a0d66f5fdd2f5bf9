"""Exporting a decoder as an ONNX file whose weights are bytes of the artifact's own files."""

from __future__ import annotations

from onnx import helper

from msconv_runtime.artifact import Artifact, Weights
from msconv_runtime.roles import LOGITS
from msconv_runtime.targets import GENAI_CONFIG

from ...families.config import DecoderConfig
from ..spec import CannotCompute, Exported, Local
from .attention import Layers, attention
from .builder import Builder, value_info
from .experts import moe
from .forms import Form, Fused, Plain
from .genai import genai_config
from .steps import begin, new_tokens, signature

PRODUCER = "msconv"


def export(local: Local) -> Exported:
    """One graph.  Raises CannotCompute for an artifact of several ranks, without weights or with codes."""
    b = Builder(_weights(local))
    form = Plain(b, local.fixed, new_tokens(local, local.fixed)) if local.fixed else Fused(b)
    _decoder(b, form, local)
    found = signature(local)
    graph = helper.make_graph(
        b.nodes,
        PRODUCER,
        [value_info(value, names) for value, names in found.inputs],
        [value_info(value, names) for value, names in found.outputs],
        b.initializers,
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", form.opset)],
        producer_name=PRODUCER,
        ir_version=form.ir_version,
    )
    return Exported(
        proto=model.SerializeToString(deterministic=True),
        nodes=b.kinds.total(),
        kinds=dict(sorted(b.kinds.items())),
        inputs=[value for value, _ in found.inputs],
        outputs=[value for value, _ in found.outputs],
        parameters=list(b.reads.values()),
        groups=[],
        nz=[],
    )


def beside(artifact: Artifact, config: DecoderConfig) -> dict[str, bytes]:
    """What lies beside the graphs, by name: how onnxruntime-genai loads the directory."""
    return {GENAI_CONFIG: genai_config(artifact, config)}


def _weights(local: Local) -> Weights:
    if local.weights is None:
        raise CannotCompute(
            f"{local.title}: an ONNX file points into the files of weights, and there are none yet.",
            "Convert first, then compile.",
        )
    if local.mesh.tp > 1:
        raise CannotCompute(
            f"{local.title}: an ONNX file is of one rank, this artifact is of {local.mesh.tp}: ONNX has no "
            "communication between ranks.",
            "`msconv reshard ARTIFACT --tp 1 --output DIR` makes one of one rank.",
        )
    return local.weights


def _decoder(b: Builder, form: Form, local: Local) -> None:
    """All of it, as rows [B*S, hidden]: a weight [out, in] is multiplied as it is stored."""
    config = local.config
    of = Layers(b, form, config, begin(b, form, local))
    x = b.rows("model.embed_tokens.weight", b.reshape("input_ids", -1))
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}."
        h = of.norm(x, prefix + "input_layernorm", config.eps)
        x = b.op("Add", x, attention(of, h, layer, local.attention(layer)))
        h = of.norm(x, prefix + "post_attention_layernorm", config.eps)
        if config.has_experts(layer):
            x = b.op("Add", x, moe(of, h, prefix + "mlp."))
        else:
            x = b.op("Add", x, of.mlp(h, prefix + "mlp.", config.ffn))
    head = of.linear(of.norm(x, "model.norm", config.eps), "model.embed_tokens" if config.tied else "lm_head")
    b.op("Identity", form.shaped(head, config.vocab), name=LOGITS)
