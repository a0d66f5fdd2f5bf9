"""SGLang's flags: those that were tried with artifacts, and those that an artifact cannot answer, with the reason.

Names are those of SGLang 0.5.23; one that ends in * stands for all that begin so.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..serving.flags import Refused

TRIED = frozenset(
    [
        "--device",
        "--dtype",
        "--tp-size",
        "--tensor-parallel-size",
        "--tp",
        "--ep-size",
        "--expert-parallel-size",
        "--ep",
        "--dp-size",
        "--dp",
        "--data-parallel-size",
        "--nnodes",
        "--node-rank",
        "--dist-init-addr",
        "--host",
        "--port",
        "--model-impl",
        "--attention-backend",
        "--mem-fraction-static",
        "--max-total-tokens",
        "--page-size",
        "--context-length",
        "--max-running-requests",
        "--chunked-prefill-size",
        "--enable-mixed-chunk",
        "--disable-radix-cache",
        "--skip-tokenizer-init",
        "--sleep-on-idle",
        "--log-level",
        "--served-model-name",
        "--api-key",
        "--admin-api-key",
        "--kv-cache-dtype",
        "--json-model-override-args",
        "--load-format",
        "--enable-metrics",
        "--speculative-algorithm",
        "--speculative-draft-model-path",
        "--speculative-draft-model",
        "--speculative-num-steps",
        "--speculative-eagle-topk",
        "--speculative-num-draft-tokens",
        "--speculative-ngram-min-bfs-breadth",
        "--speculative-ngram-max-bfs-breadth",
        "--enable-return-hidden-states",
        "--return-hidden-states-mode",
    ]
)
CHECKED = (  # their values are looked at
    "--json-model-override-args",
    "--kv-cache-dtype",
    "--speculative-algorithm",
    "--speculative-draft-model-path",
    "--speculative-eagle-topk",
    "--speculative-ngram-max-bfs-breadth",
    "--enable-return-hidden-states",
    "--return-hidden-states-mode",
)


LOADS = "msconv loads the weights, as the artifact has them"
PLACED = "experts are where `msconv convert --ep` put them"
POOL = "the graphs take SGLang's plain pool of keys and values, on the device"
HALF = "`msconv serve --disaggregation prefill` or `decode`, before the --, gives SGLang this flag"
GATE = "its requests would not pass msconv's list of endpoints"
LAYOUT = "the artifact's ranks are those of tp and ep"
TORCH = "the model is a MindSpore graph, without torch modules"
TEXT = "the model takes text"
CHAIN = "one layer, or one model, drafts a chain of a fixed length, and attends to all that stands before"
DRAFT = "a draft is an artifact too, loaded as it is"
ATTEND = "the graphs attend and choose experts by themselves, for drafts too"
REFUSED = (
    Refused("--model-path --model", "the artifact is the model"),
    Refused("--config", "flags from a file are not checked: write them here"),
    Refused("--is-embedding", "the graphs give the logits of the next token, no embeddings"),
    Refused("--enable-mis", "attention sees all that stands before, also other items of a prompt"),
    Refused(
        "--enable-lora --enable-lora-overlap-loading --lora-* --max-lora* --uno-lora-path "
        "--experts-shared-outer-loras --no-experts-shared-outer-loras --no-lora-strict-loading",
        "the graphs have no place for LoRA: merge it into the checkpoint and convert again",
    ),
    Refused("--enable-multi-layer-eagle --speculative-adaptive*", CHAIN),
    Refused("--speculative-draft-window-size --speculative-draft-sink-size", CHAIN),
    Refused("--speculative-token-map", DRAFT),
    Refused(
        "--speculative-use-rejection-sampling --speculative-use-block-verification",
        "a draft is accepted where the target says the same",
    ),
    Refused(
        "--speculative-dflash-* --speculative-dspark-* --speculative-domino-*", "no graphs are drafts of this kind"
    ),
    Refused("--speculative-draft-model-revision --speculative-draft-load-format", DRAFT),
    Refused("--speculative-draft-model-quantization", DRAFT, ("unquant",)),
    Refused("--decrypted-draft-config-file --enable-draft-weights-cpu-backup", DRAFT),
    Refused("--speculative-draft-attention-backend --speculative-attention-mode --speculative-dsa-*", ATTEND),
    Refused("--speculative-moe-* --speculative-enable-* --no-speculative-*", ATTEND),
    Refused("--speculative-draft-kv-cache-dtype", POOL, ("auto",)),
    Refused(
        "--speculative-accept-threshold-*", "a draft is accepted where the target says the same", ("1", "1.0")
    ),
    Refused("--speculative-ngram-external-*", "drafts come from the tokens that the server has seen"),
    Refused("--decoupled-spec-* --spec-trace-dir", "a draft runs beside its target, in the same processes"),
    Refused(
        "--quantization --quantization-param-path --modelopt-* --quantize-and-serve --rl-quant-profile "
        "--enable-fp32-lm-head --rl-on-policy-target",
        "the weights are of the type that they were converted to: `msconv convert --dtype`",
    ),
    Refused("--pp-* --pipeline-parallel-size", LAYOUT, ("1",)),
    Refused(
        "--attn-dp-size --attention-data-parallel-size --attn-cp-size --moe-dp-size --dcp-size", LAYOUT, ("1",)
    ),
    Refused(
        "--attention-context-parallel-size --moe-data-parallel-size --decode-context-parallel-size", LAYOUT, ("1",)
    ),
    Refused(
        "--dcp-* --dwdp-size --enable-dp-attention* --enable-dp-lm-head --enable-prefill-cp --cp-strategy", LAYOUT
    ),
    Refused("--model-impl", "the artifact is served by SGLang's slot for MindSpore", ("mindspore",)),
    Refused("--model-config-parser", "config.json is Hugging Face's", ("auto", "hf")),
    Refused("--load-format", LOADS, ("auto", "safetensors")),
    Refused("--decrypted-config-file --revision", "the artifact's own config.json is served"),
    Refused(
        "--trust-remote-code --enable-custom-logit-processor",
        "an artifact, and a request, is data and runs no code",
    ),
    Refused("--model-loader-extra-config --download-dir --custom-weight-loader --startup-weight-load-mode", LOADS),
    Refused(
        "--weight-loader-* --remote-instance-* --checkpoint-engine-* --weight-cache-* --modelexpress-*", LOADS
    ),
    Refused("--delete-ckpt-after-loading --model-checksum --engine-info-bootstrap-port", LOADS),
    Refused("--cpu-offload-gb", LOADS, ("0",)),
    Refused("--offload-* --kt-* --ple-offload-* --enable-weights-cpu-backup --enable-memory-saver", LOADS),
    Refused("--enable-paged-experts --paged-experts-num-resident", LOADS),
    Refused("--enable-torch-compile --enable-torch-compile-debug-mode --torch-compile-max-bs", TORCH),
    Refused("--debug-tensor-dump-* --forward-hooks --msprobe-dump-config --kv-canary*", TORCH),
    Refused("--enable-two-batch-overlap --enable-single-batch-overlap --tbo-* --dllm-*", TORCH),
    Refused(
        "--enable-hierarchical-cache --enable-hicache --hicache-* --enable-lmcache "
        "--lmcache-config-file --enable-flexkv --flexkv-config-file --enable-hisparse --hisparse-config "
        "--enable-unified-memory --unified-cache-* "
        "--enable-unified-cache-external-linker --enable-page-major-kv-layout --enable-kv-cache-sharding "
        "--prefill-only-disable-kv-cache --radix-cache-backend",
        POOL,
    ),
    Refused("--disaggregation-mode", HALF, ("null",)),
    Refused("--disaggregation-transfer-backend --disaggregation-bootstrap-port", HALF),
    Refused("--disaggregation-* --enable-pd-role-switch --enable-pdmux --pdmux-config-path", POOL),
    Refused("--tokenizer-worker-num", GATE, ("1",)),
    Refused(
        "--enable-http-worker-reuseport --grpc-* --smg-* --sidecar --sidecar-args --use-ray --enable-http2", GATE
    ),
    Refused("--encoder-* --language-only --language-model-only --enable-multimodal --mm-*", TEXT),
    Refused("--enable-mm-global-cache --enable-prefix-mm-cache --enable-broadcast-mm-inputs-process", TEXT),
    Refused("--enable-return-aux-hidden-states --return-aux-*", "the graphs give no such hidden states"),
    Refused(
        "--enable-return-routed-experts --enable-return-indexer-topk", "the graphs do not tell what they choose"
    ),
    Refused(
        "--enable-eplb --eplb-* --init-expert-location --ep-num-redundant-experts --ep-dispatch-algorithm", PLACED
    ),
    Refused("--expert-distribution-* --elastic-ep-* --enable-elastic-expert-backup --max-ep-size", PLACED),
    Refused("--moe-a2a-backend", PLACED, ("none",)),
)


def flag_problems(given: Mapping[str, str]) -> list[str]:
    """The flags that an artifact cannot answer, each with its reason."""
    problems = []
    for flag, value in given.items():
        refused = next((r for r in REFUSED if r.covers(flag)), None)
        if refused is not None and value not in refused.fine:
            problems.append(f"{f'{flag} {value}'.strip()[:80]}: {refused.why}.  Leave the flag out")
        elif refused is None and flag not in TRIED and (meant := _meant(flag)):
            problems.append(f"{flag}: SGLang takes it for {meant}.  Write the flag in full, or leave it out")
    return problems


def untried(given: Mapping[str, str]) -> list[str]:
    """Flags that are passed on and that nobody has tried with an artifact."""
    return [flag for flag in given if flag not in TRIED and not any(r.covers(flag) for r in REFUSED)]


def _meant(flag: str) -> str:
    if found := next((full for full in CHECKED if full.startswith(flag)), ""):
        return found
    return next((full for r in REFUSED if (full := r.shortened(flag))), "")
