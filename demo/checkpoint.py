"""Make a tiny but real Hugging Face checkpoint (Qwen3) that knows the Zen of Python by heart.

Text and chat both stop by themselves: every line and every answer ends in the one eos token, `<|im_end|>`.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAD, START, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# The split pattern of Qwen's own tokenizer, so that a loader which puts its Qwen class in place of the
# generic one still cuts text into the same tokens.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MAX_TOKENS = 500
MAX_STEPS = 141
LEARNING_RATE, WARM_UP = 5e-3, 10
# In logits, between the right token and the best wrong one: far more than bfloat16 or int8 weights can cost.
MARGIN = 7.0

Example = tuple[list[int], list[int]]  # the tokens given, the tokens to learn


def zen_lines() -> list[str]:
    """The 19 aphorisms, without the title."""
    with contextlib.redirect_stdout(io.StringIO()):  # importing it prints it
        import this
    return codecs.decode(this.s, "rot13").splitlines()[2:]


def splits(line: str) -> list[tuple[str, str]]:
    """Every way to cut a line between two words; the rest keeps its leading space."""
    return [(line[:at], line[at:]) for at, char in enumerate(line) if char == " "]


def chat(tokenizer: Any, content: str) -> str:
    messages = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def make_tokenizer(lines: list[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_TOKENS,
        special_tokens=[PAD, START, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The names of the roles occur once in each chat prompt: twice here, so that each becomes one token.
    bpe.train_from_iterator([*lines, *["system\nuser\nassistant"] * 2], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def make_model(tokenizer: Any) -> Any:
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,  # padded, as in the checkpoints that Qwen publishes
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="float32",
        **ends,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, **ends)
    return model


def make_examples(tokenizer: Any, lines: list[str]) -> list[Example]:
    """Each line as plain text, and each cut of it as a question and its answer."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    plain = [encode(line + EOS) for line in lines]
    return [(ids[:1], ids[1:]) for ids in plain] + [
        (encode(chat(tokenizer, start)), encode(rest.lstrip() + EOS))
        for line in lines
        for start, rest in splits(line)
    ]


def train(model: Any, examples: list[Example], pad: int, say: Callable[[str], object]) -> None:
    import torch
    from torch.nn.functional import cross_entropy, one_hot

    followers: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)
    for given, wanted in examples:
        for at, token in enumerate(wanted):
            followers[(*given, *wanted[:at])].add(token)

    shape = len(examples), max(len(given) + len(wanted) for given, wanted in examples)
    tokens = torch.full(shape, pad)
    learn, decided = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for row, (given, wanted) in enumerate(examples):
        tokens[row, : len(given) + len(wanted)] = torch.tensor(given + wanted)
        for at in range(len(wanted)):
            learn[row, len(given) + at] = True
            # Two lines may start alike: then nothing decides between them, and no margin can be asked for.
            decided[row, len(given) + at] = len(followers[(*given, *wanted[:at])]) == 1
    targets, decided = tokens[:, 1:][learn[:, 1:]], decided[:, 1:][learn[:, 1:]]
    is_target = one_hot(targets, model.config.vocab_size).bool()

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
    model.train()
    for step in range(MAX_STEPS):
        # Padding is on the right, where causal attention never looks: no mask is needed.
        logits = model(tokens, use_cache=False).logits[:, :-1][learn[:, 1:]]
        loss = cross_entropy(logits, targets)
        best_wrong = logits.detach().masked_fill(is_target, float("-inf")).amax(-1)
        margin = (logits.detach()[is_target] - best_wrong)[decided].min().item()
        if step % 10 == 0 or margin >= MARGIN:
            say(f"step {step:3d}  loss {loss.item():.4f}  smallest margin {margin:+.1f}")
        if margin >= MARGIN:
            break
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / WARM_UP)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


def check(directory: Path, lines: list[str]) -> int:
    """Load what was saved, continue every line from every start that is its alone; how many there were."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory)
    cuts = [
        (start, rest)
        for line in lines
        for start, rest in splits(line)
        if sum(other.startswith(start + " ") for other in lines) == 1
    ]
    asked = [(start, rest + EOS) for start, rest in cuts]
    asked += [(chat(tokenizer, start), rest.lstrip() + EOS) for start, rest in cuts]
    batch = tokenizer([prompt for prompt, _ in asked], return_tensors="pt", padding=True)
    with torch.inference_mode():
        out = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=64
        )
    for (prompt, wanted), ids in zip(asked, out[:, batch["input_ids"].shape[1] :], strict=True):
        got = tokenizer.decode(ids).replace(PAD, "")
        if got != wanted:
            raise SystemExit(f"the checkpoint continues {prompt!r} with {got!r} instead of {wanted!r}")
    return len(asked)


def make_checkpoint(directory: Path, say: Callable[[str], object] = print) -> None:
    import torch

    began = time.monotonic()
    torch.manual_seed(0)
    lines = zen_lines()
    tokenizer = make_tokenizer(lines)
    model = make_model(tokenizer)
    say(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {len(lines)} lines")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small matrices: on a busy machine two threads took five times as long as one
    train(model, make_examples(tokenizer, lines), tokenizer.pad_token_id, say)
    torch.set_num_threads(threads)
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)
    (directory / "evaluation.txt").write_text(EOS.join(lines), encoding="utf-8")  # for verify of int8
    count = check(directory, lines)
    say(f"{directory}: {count} prompts answered exactly, {time.monotonic() - began:.0f} s in all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="where to write the checkpoint")
    make_checkpoint(parser.parse_args().directory)


if __name__ == "__main__":
    main()
