"""vLLM's offline engine on an artifact, in a process of its own: reads what it shall do, writes what it gave.

On one rank all is in this process, and what has been compiled can be looked at.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    if asked["tp"] == 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from msconv_runtime.serving import loading
    from msconv_runtime.vllm.arguments import arguments
    from msconv_runtime.vllm.environment import use_cpu

    use_cpu(asked["tp"])
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"max_num_batched_tokens": asked["chunk"], "max_num_seqs": 8, **asked["options"]}
    llm = LLM(**{**arguments(asked["root"]), **options}, skip_tokenizer_init=True, disable_log_stats=False)
    sampling = SamplingParams(
        temperature=0, max_tokens=asked["new"], ignore_eos=True, detokenize=False, logprobs=1
    )
    rounds, hits = [], []
    for _ in range(2):
        given = llm.generate([{"prompt_token_ids": ids} for ids in asked["prompts"]], sampling, use_tqdm=False)
        rounds.append([_told(output.outputs[0]) for output in given])
        hits.append(sum(m.value for m in llm.get_metrics() if m.name == "vllm:prefix_cache_hits"))
    state = loading.state(Path(asked["root"]))
    Path(sys.argv[2]).write_text(json.dumps({"rounds": rounds, "hits": hits, "state": state}))


def _told(answer: Any) -> dict[str, Any]:
    tokens = list(answer.token_ids)
    return {"tokens": tokens, "logprobs": [at[t].logprob for at, t in zip(answer.logprobs, tokens, strict=True)]}


if __name__ == "__main__":
    main()
