"""Manifests of artifacts that were never made: layouts of published models, invented digests and errors."""

from __future__ import annotations

import json
from pathlib import Path

from msconv.families import DecoderConfig, configure
from msconv.layout.cuts import make_mesh
from msconv.layout.files import file_name
from msconv.layout.model import expected_sources
from msconv.layout.planning import make_plan
from msconv.quant import format_asked
from msconv_runtime import claims
from msconv_runtime.artifact import (
    FORMAT,
    Dropped,
    Graph,
    GraphInput,
    GraphOutput,
    GraphParameter,
    Manifest,
    Model,
    Padding,
    Parallel,
    SourceFile,
    TensorEntry,
    Verified,
    WeightFile,
    Weights,
    digest_bytes,
)

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
KINDS = {"MatMul": 700, "RmsNorm": 123, "AddRmsNorm": 122, "GroupedMatmulV4": 116, "AllReduce": 122}


def invented(name: str) -> str:
    return digest_bytes(name.encode())


def of_int8(layers: int) -> dict[str, str | int | float]:
    """What `verify` writes of int8: layer 1's MLP has the most led codes, layer 2's attention none at all."""
    shares = {f"int8_led_share model.layers.{i}.{m}": 1e-6 for i in range(layers) for m in ("self_attn", "mlp")}
    shares |= {"int8_led_share model.layers.1.mlp": 5e-5, "int8_led_share model.layers.2.self_attn": 0.0}
    codes = {"int8_codes_compared": 1_000_000, "int8_codes_led": 37, "int8_codes_unexplained": 0}
    drift = {"kl": 5.1e-4, "kl_bound": 2e-3, "argmax_agreement": 0.996}
    drift |= {"perplexity": 12.375, "perplexity_unquantised": 12.25}
    return {**codes, **shares, **{f"int8_drift_{name}": n for name, n in drift.items()}}


def manifest_of(
    config_name: str,
    tp: int,
    ep: int,
    targets: tuple[str, ...] = (),
    proven: bool = True,
    weights: bool = True,
    quant: str | None = None,
) -> tuple[Manifest, DecoderConfig]:
    """A manifest with everything that a real one of this model and layout has."""
    raw = json.loads((CONFIGS / f"{config_name}.json").read_text())
    family, config = configure(raw, config_name)
    sizes, mesh = config.sizes(), make_mesh(tp, ep)
    plan = make_plan(
        family.table, sizes, expected_sources(family.table, sizes, "bfloat16"), mesh, quant=format_asked(quant)
    )
    stored = Weights(
        dtype="bfloat16",
        source_dtype="float8_e4m3fn",
        quant=plan.quant,
        made=quant or "",
        digest=invented("weights"),
        files=[
            WeightFile(file_name(r, i), r, f.size, invented(f"{r} {i}"))
            for r in mesh.ranks
            for i, f in enumerate(plan.files)
        ],
        tensors=[
            TensorEntry(
                t.name,
                t.dtype,
                list(t.shape),
                t.file,
                len(plan.files[t.file].header) + t.begin,
                list(t.parts),
                [invented(f"{t.name} {r}") for r in mesh.ranks],
            )
            for t in plan.tensors
        ],
        dropped=[Dropped("model.layers.61.*", 785, "multi-token prediction layer, not part of the decoder")],
        padded=[Padding("vocab", config.vocab, config.vocab + 5)],
    )
    graphs = [
        Graph(
            target=target,
            role=role,
            path=f"graphs/{target}/{role}.mindir",
            size=2_345_678,
            digest=invented(target + role),
            mindspore="2.10.0",
            nodes=sum(KINDS.values()),
            inputs=[
                GraphInput("input_ids", "int32", [None]),
                GraphInput("k_cache.0", dtype, [None, None, 8, 128], "cache"),
            ],
            outputs=[GraphOutput("logits", "float32", [None, config.vocab])],
            reads=[
                GraphParameter(t.name, t.dtype if t.dtype != "bfloat16" else dtype, list(t.shape))
                for t in plan.tensors
                if t.name != "rank_onehot"
            ],
            kinds=KINDS,
        )
        for target in targets
        for dtype in ["float32" if target == "cpu" else "bfloat16"]
        for role in ("prefill", "decode")
    ]
    norms = {"model.norm": 2.2e-6} | {
        f"model.layers.{i}.{kind}": (i + 1) * 3.5e-8
        for i in range(config.layers)
        for kind in ("input_layernorm", "post_attention_layernorm")
    }
    verified = [
        Verified(
            target=target,
            weights_digest=stored.digest,
            graph_digests=[g.digest for g in graphs if g.target == target],
            reference=f"transformers on {config_name}",
            mode="float32",
            bound=1e-4,
            max_abs_logit_error=7.5e-6,
            argmax_agreement=1.0,
            ranks=tp,
            logits_compared=204,
            settings=(of_int8(config.layers) if quant else {})
            | {"prefill": 7.5e-6, "decode": 3.25e-6, "half_precision_max_abs_logit_error": 0.875}
            | {"half_precision_argmax_agreement": 0.96875},
            norms=norms,
        )
        for target in (targets if proven else ())
    ]
    model = Model(
        family=family.name,
        architecture=family.architecture,
        source=config_name,
        config_digest=invented("config"),
        parameters=plan.parameters,
        files=[SourceFile(f"model-{i}.safetensors", 4_300_000_000 + i, invented(str(i))) for i in range(163)],
    )
    manifest = Manifest(
        FORMAT, "msconv 0.1.0", model, Parallel(tp, ep), stored if weights else None, graphs, verified
    )
    for proof in verified:
        claims.note(manifest, proof)
    return manifest, config
