"""vLLM's flags: those that were tried with artifacts, those that are passed on untried, and all others, which are
refused: vLLM lets flags be shortened and set in parts, so that one it does not know may be another.

Names are those of vLLM 0.32.0; one that ends in * stands for all that begin so.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..serving.flags import Refused

HIDDEN = "<hidden>"
KEYS = ("--api-key", "--hf-token")
TRIED_WORDS = (
    "--model --hf-overrides --load-format --dtype --tensor-parallel-size --enforce-eager --host --port "
    "--served-model-name --block-size --num-gpu-blocks-override --kv-cache-memory-bytes --max-model-len "
    "--max-num-seqs --max-num-batched-tokens --enable-prefix-caching --no-enable-prefix-caching --max-logprobs "
    "--seed --skip-tokenizer-init --api-key"
)
UNTRIED_WORDS = (  # of the server before the model, or of the order in which requests run
    "--chat-template --chat-template-content-format --default-chat-template-kwargs --response-role "
    "--reasoning-parser --enable-auto-tool-choice --tool-call-parser --exclude-tools-when-tool-choice-none "
    "--generation-config --override-generation-config --structured-outputs-config --tokenizer-mode "
    "--allowed-origins --allowed-methods --allowed-headers --allow-credentials --ssl-keyfile --ssl-certfile "
    "--ssl-ca-certs --ssl-cert-reqs --ssl-ciphers --root-path --enable-request-id-headers --disable-fastapi-docs "
    "--uvicorn-log-level --disable-uvicorn-access-log --disable-access-log-for-endpoints --max-log-len "
    "--enable-log-requests --enable-log-outputs --log-error-stack --disable-log-stats --log-level "
    "--otlp-traces-endpoint --shutdown-timeout --enable-prompt-tokens-details --enable-force-include-usage "
    "--return-tokens-as-token-ids --logprobs-mode --stream-interval --scheduling-policy --enable-chunked-prefill "
    "--no-enable-chunked-prefill --long-prefill-token-threshold --max-num-queued-reqs --max-num-queued-tokens "
    "--prefix-caching-hash-algo --h11-max-header-count --h11-max-incomplete-event-size"
)
TRIED, UNTRIED = frozenset(TRIED_WORDS.split()), frozenset(UNTRIED_WORDS.split())


LOADS = "msconv loads the weights, as the artifact has them"
LAYOUT = "the artifact's ranks are those of its tp"
POOL = "the graphs take vLLM's plain pool of keys and values, in the machine's memory"
GRAPH = "the model is a compiled MindSpore graph, without torch modules"
CODE = "an artifact is data and runs no code"
CONFIG = "the artifact's own config.json is served"
TYPE = "the weights are of the type that they were converted to: `msconv convert --dtype`"
PLACED = "experts are where `msconv convert --ep` put them"
SIZED = "--kv-cache-memory-bytes says how large the pool is"
LORA = "the graphs have no place for LoRA: merge it into the checkpoint and convert again"
REFUSED = (
    Refused("--config", "flags from a file are not checked: write them here"),
    Refused("--middleware", "msconv puts its own in this place"),
    Refused("--grpc* --headless --uds", "msconv serves over HTTP, from one process"),
    Refused("--api-server-count --nnodes --data-parallel-size", LAYOUT, ("1",)),
    Refused("--pipeline-parallel-size --prefill-context-parallel-size", LAYOUT, ("1",)),
    Refused("--decode-context-parallel-size", LAYOUT, ("1",)),
    Refused("--data-parallel-* --enable-elastic-ep --dcp-* --node-rank --master-*", LAYOUT),
    Refused("--enable-expert-parallel --enable-eplb --eplb-config", PLACED),
    Refused("--distributed-executor-backend", "the ranks are processes of one machine", ("mp",)),
    Refused("--worker-cls --worker-extension-cls --scheduler-cls --logits-processors --trust-*", CODE),
    Refused("--tool-parser-plugin --reasoning-parser-plugin --io-processor-plugin --model-class-overrides", CODE),
    Refused("--runner --convert --pooler-config", "the graphs give the logits of the next token, no embeddings"),
    Refused("--hf-config-path --config-format --revision --code-revision --tokenizer", CONFIG),
    Refused("--tokenizer-revision", CONFIG),
    Refused("--model-impl", "the artifact is served by msconv's model class"),
    Refused("--model-loader-extra-config --download-dir --ignore-patterns --safetensors-* --weight-*", LOADS),
    Refused("--cpu-offload-* --offload-* --enable-sleep-mode --sleep-* --enable-cumem-allocator", LOADS),
    Refused("--quantization --quantization-config", TYPE),
    Refused("--enable-lora --lora-* --max-lora* --max-cpu-loras --fully-sharded-loras --default-mm-loras", LORA),
    Refused("--speculative-config --spec-*", "drafts of artifacts are served by SGLang, the usual engine"),
    Refused("--kv-cache-dtype", POOL, ("auto",)),
    Refused("--kv-transfer-config --kv-events-config --kv-offloading-* --kv-sharing-* --ec-*", POOL),
    Refused("--gpu-memory-utilization --device-memory-utilization", SIZED),
    Refused("--no-enforce-eager --compilation-config --optimization-level --cudagraph-* --attention-*", GRAPH),
    Refused("--moe-backend --linear-backend --kernel-config --enable-dbo --ubatch-size", GRAPH),
    Refused("--enable-prompt-embeds --enable-return-routed-experts", "the graphs take tokens and give logits"),
    Refused("--limit-mm-per-prompt --mm-* --enable-mm-embeds --allowed-local-media-path", "the model takes text"),
    Refused("--watermark* --enable-trace-replay", "it wants vLLM's second model runner, which was not tried"),
)  # fmt: skip


def flag_problems(given: Mapping[str, str]) -> list[str]:
    """The flags that an artifact cannot answer, and those that vLLM may take for others, each with the reason."""
    return [problem for flag, value in given.items() if (problem := _problem(flag, value))]


def _problem(flag: str, value: str) -> str:
    said, name = f"{flag} {value}".strip()[:80], flag.partition(".")[0].replace("_", "-")
    refused = next((r for r in REFUSED if r.covers(name)), None)
    if refused is not None and not (flag == name and value in refused.fine):
        return f"{said}: {refused.why}.  Leave the flag out"
    if refused is not None or flag in TRIED or flag in UNTRIED:
        return ""
    if name in TRIED or name in UNTRIED:
        way = "in dashes" if "_" in flag else "as a whole"
        return f"{said}: this form of {name} is not checked.  Write {name} {way}"
    return f"{said}: msconv knows no such flag of vLLM's.  Write it in full, or leave it out"


def untried(given: Mapping[str, str]) -> list[str]:
    """Flags that are passed on and that nobody has tried with an artifact."""
    return [flag for flag in given if flag in UNTRIED]


def hide_keys(argv: list[str]) -> list[str]:
    """A command line with HIDDEN in place of each key: such a flag may take several."""
    shown: list[str] = []
    in_keys = False
    for word in argv:
        name, equals, _ = word.partition("=")
        if word.startswith("--"):
            in_keys = name in KEYS and not equals
            shown.append(f"{name}={HIDDEN}" if name in KEYS and equals else word)
        else:
            shown.append(HIDDEN if in_keys else word)
    return shown
