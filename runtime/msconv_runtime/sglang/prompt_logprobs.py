"""Log probabilities of prompts: the logits of a prompt's tokens, made and reduced piece by piece.

SGLang's own InputLogprobProcessor reduces them, as for its torch models.  It asks for the logits of some rows of
hidden states at a time; here a row is the number of a token, and the graph runs that piece of the batch when it is
asked for.  So [tokens, vocabulary] is never there at once, and a prompt's pieces run in their order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sglang.srt.layers.logits_processor import LogitsMetadata, LogitsProcessorOutput
from sglang.srt.layers.logprob_processor import InputLogprobProcessor

from ..graphs import Graphs
from ..paging import Batch, Tails


def asked(forward_batch: Any) -> LogitsMetadata | None:
    """What a batch that extends sequences asks for; None if it asks for no log probabilities of prompts."""
    metadata = LogitsMetadata.from_forward_batch(forward_batch)
    return metadata if metadata.extend_return_logprob else None


def run(graphs: Graphs, batch: Batch, metadata: LogitsMetadata, caches: list[Any], device: Any) -> Any:
    """SGLang's LogitsProcessorOutput for a batch in which log probabilities of prompts are asked for.

    Of each sequence the tokens from `extend_logprob_start_lens_cpu` on give a row; where that is its end (an
    ordinary request beside), its last one alone.  Tokens before them run as any prompt does."""
    starts = metadata.extend_logprob_start_lens_cpu
    counts = [int(n) for n in batch.q_lens]
    tails = Tails(batch, [min(start, n - 1) for start, n in zip(starts, counts, strict=True)], graphs.page)
    if (before := tails.before()) is not None:
        graphs.prefill(before, caches)

    def logits_of(rows: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        part = tails.rows(int(rows[0]), int(rows[-1]) + 1)
        return torch.from_numpy(graphs.every_token(part, caches))

    sequences = [i for i, count in enumerate(tails.counts) for _ in range(count)]  # of each row
    last = [int(end) - 1 for end in np.cumsum(tails.counts)]
    wanted = [row for row, i in enumerate(sequences) if starts[i] < counts[i]]
    metadata.sample_indices_cpu, metadata.input_logprob_indices_cpu = last, wanted
    metadata.extend_input_logprob_token_ids_gpu = metadata.extend_input_logprob_token_ids_gpu.cpu()
    processor = InputLogprobProcessor(graphs.vocab_size)
    processor.enable_logprobs_chunk, processor.logprobs_chunk_size = True, graphs.rows_at_once
    result, logits = processor.forward(
        pruned_states=torch.arange(len(sequences)),
        sample_indices=torch.tensor(last),
        input_logprob_indices=torch.tensor(wanted),
        token_to_seq_idx=sequences,
        lm_head=None,
        get_logits_fn=logits_of,
        logits_metadata=metadata,
    )
    output = LogitsProcessorOutput(next_token_logits=logits.to(device), hidden_states=None)
    result.write_input_to(output)
    return output
