"""Requests that no sane client sends, in groups: whatever is answered, a server lives on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

HUGE = (2**31, 2**53, 2**63, 2**64, 10**40)
RAW = ("NaN", "Infinity", "-Infinity", "1e999", "-0.0", "1e-320")  # numbers that Python's encoder does not write
WRONG = (None, True, "", "x", "1", -1, 0, 1.7, 2**40, [], [None], {}, {"a": 1}, [[1]])
GENERATE, CHAT, COMPLETIONS = "/generate", "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True)
class Odd:
    """One request.  `cut`: the client hangs up after so many bytes of the answer, None: it reads all."""

    method: str
    path: str
    body: bytes = b""
    kind: str = "application/json"
    cut: int | None = None


def post(path: str, value: Any) -> Odd:
    return Odd("POST", path, json.dumps(value).encode())


def raw(path: str, text: str) -> Odd:
    return Odd("POST", path, text.encode("utf-8", "surrogatepass"))


def groups(control: list[str]) -> dict[str, list[Odd]]:
    """`control`: every path of SGLang's router."""
    return {
        "control": list(_control(control)),
        "no JSON": list(_no_json()),
        "sampling": list(_sampling()),
        "fields": list(_fields()),
        "tokens": list(_tokens()),
        "grammars": list(_grammars()),
        "chat": list(_chat()),
        "texts": list(_texts()),
        "cut off": list(_cut_off()),
        "aborts": list(_aborts()),
    }


def _control(paths: list[str]) -> Iterator[Odd]:
    """With the bodies that ended or wedged a server, and with none."""
    group = {
        "master_address": "127.0.0.1",
        "master_port": 29871,
        "rank_offset": 1,
        "world_size": 2,
        "group_name": "g",
        "backend": "gloo",
        "ports": "29872",
        "group_rank": 0,
    }
    known = {
        "/configure_logging": {"log_requests": True, "log_requests_level": 99, "dump_requests_folder": "/tmp/odd"},
        "/start_profile": {"output_dir": "/proc/no/such", "num_steps": 1},
        "/slow_down": {"forward_sleep_time": 1000.0},
        "/pause_generation": {"mode": "retract"},
        "/set_internal_state": {"server_args": {"max_running_requests": -1, "pp_max_micro_batch_size": -8}},
        "/open_session": {"capacity_of_str_len": 1 << 60},
        "/update_weights_from_disk": {"model_path": "/"},
        "/load_lora_adapter": {"lora_name": "a", "lora_path": "/"},
        "/get_weights_by_name": {"name": "model.embed_tokens.weight", "truncate_size": 1},
        "/release_memory_occupation": {"tags": ["weights"]},
        "/weights_checker": {"action": "reset_tensors"},
    }
    for path in paths:
        there = path.replace("{model:path}", "x").replace("{response_id}", "x")
        for body in ({}, known.get(path, group)):
            yield post(there, body)
        yield Odd("GET", there)
    yield from (
        Odd(m, GENERATE, b"{}") for m in ("GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "X")
    )
    for path in ("//generate", "/generate/", "/GENERATE", "/generate?x=%00", "/../generate", "/%2e%2e/etc/passwd"):
        yield post(path, {"input_ids": [1]})
    yield from (
        Odd("GET", path) for path in ("/slow_down/", "/start%5Fprofile", "/v1/loads?dp_rank=99", "/a" * 3000)
    )


def _no_json() -> Iterator[Odd]:
    texts = [
        "",
        " ",
        "{",
        "}",
        "[]",
        "null",
        "true",
        "3",
        '"x"',
        "{'text': 'a'}",
        '{"text": "a",}',
        "\x00",
        "\ufeff{}",
    ]
    texts += ['{"text": "a"} {"text": "b"}', '{"text": "\\ud800"}', '{"text": "a", "text": 3}', "[" * 100_000]
    texts += [
        '{"a":' * 5000 + "1" + "}" * 5000,
        '{"sampling_params":' * 900 + "1" + "}" * 900,
        "{" + " " * 200_000,
    ]
    for path in (GENERATE, CHAT, COMPLETIONS):
        yield from (raw(path, text) for text in texts)
        yield Odd("POST", path, b'{"text": "\xff\xfe"}')
        yield Odd("POST", path, b'{"text": "a"}', kind="text/plain")
        yield Odd("POST", path, b"text=a", kind="application/x-www-form-urlencoded")


def _sampling() -> Iterator[Odd]:
    names = (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
    )
    for name in (*names, "max_new_tokens", "min_new_tokens", "n", "sampling_seed"):
        for value in (-1, 0, "x", None, [], *HUGE[2:4]):
            if name in ("n", "max_new_tokens") and isinstance(value, int) and value > 1:
                continue  # as many answers as asked for: below
            yield post(GENERATE, {"input_ids": [3, 4], "sampling_params": {"max_new_tokens": 2, name: value}})
        for text in RAW[:4]:
            yield raw(
                GENERATE, f'{{"input_ids": [3], "sampling_params": {{"max_new_tokens": 2, "{name}": {text}}}}}'
            )
    for more in (
        {"no_such": 1},
        {"stop": "\x00"},
        {"stop": [1]},
        {"stop": [""] * 1000},
        {"stop_token_ids": [-1]},
        {"stop_regex": "("},
        {"stop_regex": "(a+)+$"},
        {"stop_regex": "(.+)+\n\n\n$", "max_new_tokens": 60, "ignore_eos": True},
        {"stop_regex": [".*.*.*.*x"] * 32, "max_new_tokens": 60, "ignore_eos": True},
        {"stop_regex": [f".+{i}y" for i in range(5)], "max_new_tokens": 60, "ignore_eos": True},
        {"stop_regex": "(" * 200},
        {"stop_regex": 3},
        {"logit_bias": {"-1": 5.0}},
        {"logit_bias": {"99999999": 5.0}},
        {"logit_bias": {"x": 5.0}},
        {"logit_bias": {"3": 1e300}},
        {"logit_bias": [1]},
        {"min_new_tokens": 5, "max_new_tokens": 2},
        {"custom_params": {"a": "b"}},
        {"skip_special_tokens": "maybe"},
        {"n": 2**40},
        {"n": 10**7},
        {"max_new_tokens": 2**40, "stop_token_ids": list(range(100))},
    ):
        yield post(GENERATE, {"input_ids": [3, 4], "sampling_params": {"max_new_tokens": 2, **more}})


def _fields() -> Iterator[Odd]:
    few = {"sampling_params": {"max_new_tokens": 2}}
    for name in ("text", "input_ids", "sampling_params", "rid", "stream", "return_logprob", "logprob_start_len"):
        yield from (post(GENERATE, {"input_ids": [3], **few, name: value}) for value in WRONG)
    odd = {
        "top_logprobs_num": (-1, 2**40, "x"),
        "token_ids_logprob": ([-1], [10**9], ["x"], 3),
        "return_text_in_logprobs": (True, 3),
        "lora_path": ("x", ["x"]),
        "session_params": ({"id": "no", "rid": "no"}, {"id": None, "offset": -5}, 3),
        "custom_logit_processor": ("x", '{"callable": "80049500"}'),
        "return_hidden_states": (True,),
        "return_routed_experts": (True,),
        "input_embeds": ([[0.5]], [], "x"),
        "image_data": ("x", ["file:///etc/passwd"], ["http://127.0.0.1:9/x.png"]),
        "audio_data": ("x",),
        "video_data": ("x",),
        "priority": (2**40, "x"),
        "bootstrap_host": ("127.0.0.1",),
        "bootstrap_room": (-1, 2**70),
        "data_parallel_rank": (7, -1),
        "routed_dp_rank": (7, -1),
        "disagg_prefill_dp_rank": (7,),
        "extra_key": ("x", 3),
        "no_logs": (True,),
        "decision_layout": ({"a": 1},),
        "background": (True,),
        "modalities": (["video"],),
        "require_reasoning": (True,),
        "return_prompt_token_ids": (True,),
        "max_dynamic_patch": (-1,),
        "conversation_id": ("../../x",),
    }
    for name, values in odd.items():
        yield from (post(GENERATE, {"input_ids": [3, 4], "return_logprob": True, **few, name: v}) for v in values)
    yield post(GENERATE, {"input_ids": [[3], [4]], "rid": ["same", "same"], **few})
    yield post(GENERATE, {"input_ids": [[3], [4]], "rid": ["one"], **few})
    yield post(GENERATE, {"text": ["a", "b"], "sampling_params": [{"max_new_tokens": 1}], "rid": "z"})


def _tokens() -> Iterator[Odd]:
    few = {"sampling_params": {"max_new_tokens": 2}}
    lists = (
        [],
        [[]],
        [[], [3]],
        [-1],
        [2**31],
        [2**40],
        [2**70],
        [1.7],
        [True],
        ["3"],
        [None],
        [[3, [4]]],
        [3, -5],
    )
    yield from (post(GENERATE, {"input_ids": ids, **few}) for ids in lists)
    yield from (post(COMPLETIONS, {"model": "x", "prompt": ids, "max_tokens": 2}) for ids in lists)
    yield from (post(GENERATE, {"input_ids": [3] * n, **few}) for n in (2047, 2048, 2049, 5000, 100_000))
    for path in ("/tokenize", "/detokenize", "/v1/score", "/v1/rerank", "/v1/messages", "/v1/responses"):
        yield from (
            post(path, {"model": "x", "prompt": v, "tokens": v, "query": v, "items": v, "input": v}) for v in WRONG
        )
    yield post("/v1/score", {"model": "x", "query": [3], "items": [[4]], "label_token_ids": [10**9]})
    yield post("/v1/score", {"model": "x", "query": [3], "items": [[4]], "label_token_ids": [-1]})
    yield post("/v1/score", {"model": "x", "query": [3], "items": [[10**9]], "label_token_ids": [4]})


def _grammars() -> Iterator[Odd]:
    regexes = ("(", "[", "*", "(?P<x", "\\", "a{1000000}", "(a|b){0}", "[^\\x00-\\U0010ffff]", "(?!a)b", "\ud83d")
    for regex in regexes:
        yield raw(
            GENERATE, json.dumps({"input_ids": [3], "sampling_params": {"max_new_tokens": 2, "regex": regex}})
        )
    schemas = ("", "{", "3", "null", '{"type": "nothing"}', '{"$ref": "#/a"}', '{"$ref": "http://127.0.0.1:9/"}')
    schemas += (
        '{"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}',
        '{"type": "string", "pattern": "("}',
    )
    schemas += ('{"enum": []}', '{"type": "integer", "minimum": 9, "maximum": 1}', '{"not": {}}', '{"allOf": 3}')
    schemas += ('{"properties":' * 300 + "{}" + "}" * 300,)
    for name, texts in (
        ("json_schema", schemas),
        ("ebnf", ("", "root", "root ::= root", "root ::= (", 'x ::= "a"')),
    ):
        for text in texts:
            yield post(GENERATE, {"input_ids": [3], "sampling_params": {"max_new_tokens": 2, name: text}})
    for tag in ("", "{", '{"type": "structural_tag"}', '{"structures": 3, "triggers": []}', "null"):
        yield post(GENERATE, {"input_ids": [3], "sampling_params": {"max_new_tokens": 2, "structural_tag": tag}})
    both = {"regex": "a", "json_schema": "{}", "ebnf": 'root ::= "a"', "max_new_tokens": 2}
    yield post(GENERATE, {"input_ids": [3], "sampling_params": both})
    for form in (
        3,
        {},
        {"type": "x"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"schema": 3}},
    ):
        yield post(CHAT, {"model": "x", "messages": [{"role": "user", "content": "a"}], "response_format": form})


def _chat() -> Iterator[Odd]:
    for messages in (
        *WRONG,
        [{"role": "user"}],
        [{"role": "nobody", "content": "a"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
        [{"role": "user", "content": [{"type": "video", "x": 1}]}],
        [{"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": "{"}}]}],
        [{"role": "tool", "content": "a"}],
        [{"role": "user", "content": "{{ 1/0 }} {% for x in y %}"}],
    ):
        yield post(CHAT, {"model": "x", "messages": messages, "max_tokens": 2})
    say = [{"role": "user", "content": "a"}]
    for more in (
        {"tools": 3},
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "object", "x": 3}}}]},
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "none"}}},
        {"chat_template_kwargs": {"add_generation_prompt": "{{", "messages": 3}},
        {"chat_template": "{{ 1/0 }}"},
        {"logprobs": True, "top_logprobs": 10**6},
        {"n": 0},
        {"max_tokens": -1},
        {"max_completion_tokens": 2**70},
        {"stream_options": 3, "stream": True},
        {"seed": 2**70},
        {"logit_bias": {"-1": 5}},
        {"logit_bias": {"99999999": 5}},
        {"reasoning_effort": "x"},
        {"continue_final_message": True},
        {"model": ""},
        {"model": "x:y"},
    ):
        yield post(CHAT, {"model": "x", "messages": say, "max_tokens": 2, **more})
    for echo in ({"echo": True}, {"logprobs": 10**6}, {"suffix": "x"}, {"best_of": 5}, {"prompt": ["a"] * 40}):
        yield post(COMPLETIONS, {"model": "x", "prompt": "a", "max_tokens": 1, **echo})


def _texts() -> Iterator[Odd]:
    texts = (
        "",
        " ",
        "\n",
        "\x00",
        "\u202e",
        "\U0010ffff",
        "\u0301" * 500,
        "👩‍👩‍👧‍👦" * 50,
        "a" * 20_000,
        "é" * 3000,
    )
    texts += ("<|im_end|>" * 50, "<|endoftext|>", "\r\n" * 500, "ﷺ" * 100)
    for text in texts:
        yield post(GENERATE, {"text": text, "sampling_params": {"max_new_tokens": 2}})
        yield post(CHAT, {"model": "x", "messages": [{"role": "user", "content": text}], "max_tokens": 2})
    yield raw(GENERATE, '{"text": "\ud800", "sampling_params": {"max_new_tokens": 2}}')


def _cut_off() -> Iterator[Odd]:
    long = {"max_new_tokens": 300, "ignore_eos": True}
    for cut in (0, 1, 50, 200, 1000, 3000):
        for stream in (True, False):
            body = {"input_ids": [5, 6, 7], "sampling_params": long, "stream": stream}
            yield Odd("POST", GENERATE, json.dumps(body).encode(), cut=cut if stream else 0)
    for n in (2, 8):
        body = {"input_ids": [5, 6], "sampling_params": {**long, "n": n}, "stream": True}
        yield Odd("POST", GENERATE, json.dumps(body).encode(), cut=300)


def _aborts() -> Iterator[Odd]:
    for body in ({}, {"rid": ""}, {"rid": "x"}, {"rid": None}, {"rid": ["x"]}, {"abort_all": True}, [], 3):
        yield post("/abort_request", body)
    yield post("/abort_request", {"rid": "x" * 100_000})
    yield raw("/abort_request", "{")
    yield from (Odd("GET", path) for path in ("/flush_cache", "/flush_cache?timeout=-1", "/flush_cache?timeout=x"))
