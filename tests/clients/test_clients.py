"""Clients as people run them against a served artifact: SGLang's benchmark, the OpenAI client, /v1/responses.

In an environment that has what they need, which `make test-clients` makes.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from demo.checkpoint import make_tokenizer, zen_lines
from tests.checkpoints import make_qwen3
from tests.e2e.servers import Server, make_artifact, serving

REQUESTS = 20
PAGE = Path(__file__).parents[2] / "docs" / "clients.md"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("datasets") is None, reason="needs packages of its own: `make test-clients`"),
]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the demonstration's tokenizer and chat template."""
    checkpoint = tmp_path_factory.mktemp("clients") / "tiny-qwen3"
    tokenizer = make_tokenizer(zen_lines())
    make_qwen3(checkpoint, vocab_size=len(tokenizer), max_position_embeddings=512, initializer_range=0.2)
    tokenizer.save_pretrained(checkpoint)
    return make_artifact(checkpoint, checkpoint.parent / "artifact")


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[Server]:
    with serving(artifact, artifact.parent / "log", "--enable-metrics") as server:
        yield server


def benchmark_of_the_page(server: Server, artifact: Path) -> str:
    """The lines of docs/clients.md, for this server and artifact, and shorter."""
    lines = PAGE.read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("    eval "))
    end = next(i for i in range(begin, len(lines)) if not lines[i].strip())
    found = "\n".join(line.strip() for line in lines[begin:end])
    for old, new in {
        "--port 30000": f"--port {server.port}",
        "--num-prompts 100": f"--num-prompts {REQUESTS}",
        "--random-input-len 512": "--random-input-len 32",
        "--random-output-len 128": "--random-output-len 16",
        "artifacts/Qwen3-8B-tp4": shlex.quote(str(artifact)),
    }.items():
        assert old in found, old
        found = found.replace(old, new)
    return found


def test_sglangs_benchmark_answers_every_request(server: Server, artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.jsonl"
    lines = f"{benchmark_of_the_page(server, artifact)} --output-file {shlex.quote(str(out))}"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euc", lines], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text().splitlines()[-1])
    assert found["completed"] == REQUESTS
    assert found["total_output_tokens"] > 0 and found["output_throughput"] > 0


def test_the_openai_client_streams_what_it_also_gets_at_once(server: Server) -> None:
    from openai import BadRequestError, OpenAI

    client = OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none")
    model = client.models.list().data[0].id
    asked = {"model": model, "messages": [{"role": "user", "content": "Beautiful is"}], "temperature": 0}
    whole = client.chat.completions.create(**asked, max_tokens=12).choices[0].message.content
    pieces = client.chat.completions.create(**asked, max_tokens=12, stream=True)
    assert whole
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == whole
    with pytest.raises(BadRequestError):
        client.chat.completions.create(**asked, max_tokens=-1)


def test_the_responses_api_answers(server: Server) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none")
    model = client.models.list().data[0].id
    answer = client.responses.create(model=model, input="Beautiful is", max_output_tokens=12, temperature=0)
    assert answer.status in ("completed", "incomplete")
    assert answer.output_text and answer.usage.output_tokens <= 12
