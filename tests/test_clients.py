"""Clients and frameworks that people use, each with merging off and on.

They come with ``pip install -e ".[clients]"``; what is missing is skipped.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

import kvmerge
from conftest import Factory
from kvmerge import pocket

pytestmark = pytest.mark.clients

MERGES = pytest.mark.parametrize("merge", [None, "flowmm"])
SCHEMA = {
    "type": "object",
    "properties": {"letter": {"type": "string", "enum": ["A", "B", "Z"]}},
    "required": ["letter"],
}
TEXT = "The code of the old box is five six seven. What is the code of the old box?"


@pytest.fixture(params=[None, "flowmm"], scope="module")
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    """Serve the pocket model with llama-cpp-python's server, in a process of its own."""
    for name in ("fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings"):
        pytest.importorskip(name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "kvmerge.llama_cpp_server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--model", pocket.model_path(), "--n_ctx", "2048"]
    command += ["--mmproj", pocket.mmproj_path(), "--n_threads", "1", "--n_threads_batch", "1"]
    command += ["--verbose", "false"]
    if request.param is not None:
        command += ["--kv_merge", request.param, "--kv_budget", "0.5"]
    server = subprocess.Popen(
        list(map(str, command)),
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    url = f"http://127.0.0.1:{port}/v1"
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"{url}/models", timeout=5).close()
            break
        except OSError:
            assert server.poll() is None, server.communicate()[1]
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.1)
    yield url
    server.terminate()
    said = server.communicate(timeout=60)[1]
    assert "Traceback" not in said, said


@pytest.fixture
def client(address: str) -> Any:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=address, api_key="none") as client:
        yield client


GREEDY = {"model": "pocket", "temperature": 0, "max_tokens": 12}


def test_openai_chat_with_pictures(client: Any, llama: Factory, prompt: pocket.Prompt) -> None:
    messages = prompt.messages(0)
    got = client.chat.completions.create(messages=messages, **GREEDY)
    text = got.choices[0].message.content
    assert got.usage.prompt_tokens > 64 * 4
    parts = client.chat.completions.create(messages=messages, stream=True, **GREEDY)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == text
    # What the class answers by itself, with merging or without.
    right = [
        llama(kv_merge=merge, kv_budget=0.5).create_chat_completion(
            messages, temperature=0, max_tokens=12
        )
        for merge in (None, "flowmm")
    ]
    assert text in [each["choices"][0]["message"]["content"] for each in right]


def test_openai_completion(client: Any) -> None:
    whole = client.completions.create(prompt=TEXT, **GREEDY)
    assert whole.usage.completion_tokens > 0
    parts = client.completions.create(prompt=TEXT, stream=True, **GREEDY)
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text


def test_openai_tools(client: Any) -> None:
    tool = {"type": "function", "function": {"name": "note", "parameters": SCHEMA}}
    for choice in ("required", {"type": "function", "function": {"name": "note"}}):
        try:
            got = client.chat.completions.create(
                messages=[{"role": "user", "content": TEXT}],
                tools=[tool],
                tool_choice=choice,
                **{**GREEDY, "max_tokens": 100},
            )
        except Exception as error:
            # The types of that server know no "required".
            assert choice == "required" and "422" in str(error), error
            continue
        (call,) = got.choices[0].message.tool_calls
        assert json.loads(call.function.arguments)["letter"] in "ABZ"


def test_openai_says_what_is_wrong(client: Any, tmp_path: Path) -> None:
    import openai

    (tmp_path / "secret.png").write_bytes(b"x")
    picture = {"type": "image_url", "image_url": {"url": str(tmp_path / "secret.png")}}
    with pytest.raises(openai.BadRequestError, match="outside the folders"):
        client.chat.completions.create(messages=[{"role": "user", "content": [picture]}], **GREEDY)
    # and goes on
    client.completions.create(prompt=TEXT, **GREEDY)


def test_openai_threads(client: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def ask(i: int) -> str:
        text = f"{TEXT} {i}"
        return client.completions.create(prompt=text, **GREEDY).choices[0].text

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(ask, range(8)))
    assert together == [ask(i) for i in range(8)]


@pytest.fixture
def our_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let frameworks that make a `llama_cpp.Llama` make one of ours; docs/usage.md shows it."""
    monkeypatch.setattr(llama_cpp, "Llama", kvmerge.Llama)


def model_options(merge: str | None) -> dict[str, Any]:
    return {"kv_merge": merge, "kv_budget": 0.5, "n_threads_batch": 1}


@MERGES
def test_langchain(merge: str | None, our_class: None) -> None:
    models = pytest.importorskip("langchain_community.llms")
    llm = models.LlamaCpp(
        model_path=str(pocket.model_path()),
        n_ctx=1024,
        n_threads=1,
        temperature=0.0,
        max_tokens=8,
        verbose=False,
        model_kwargs=model_options(merge),
    )
    assert isinstance(llm.client, kvmerge.Llama)
    whole = llm.invoke(TEXT)
    assert "".join(llm.stream(TEXT)) == whole
    assert (llm.client.kv_stats().budget is None) == (merge is None)
    llm.client.close()


@MERGES
def test_langchain_chat(merge: str | None, our_class: None) -> None:
    models = pytest.importorskip("langchain_community.chat_models")
    llm = models.ChatLlamaCpp(
        model_path=str(pocket.model_path()),
        n_ctx=1024,
        n_threads=1,
        temperature=0.0,
        max_tokens=8,
        verbose=False,
        model_kwargs=model_options(merge),
    )
    whole = llm.invoke(TEXT).content
    assert whole
    assert "".join(part.content for part in llm.stream(TEXT)) == whole
    llm.client.close()


@MERGES
def test_llama_index(merge: str | None, our_class: None) -> None:
    pytest.importorskip("llama_index.core")
    module = pytest.importorskip("llama_index.llms.llama_cpp.base")
    # It has taken the name when it was imported.
    module.Llama = kvmerge.Llama
    llm = module.LlamaCPP(
        model_path=str(pocket.model_path()),
        temperature=0.0,
        max_new_tokens=8,
        context_window=1024,
        verbose=False,
        model_kwargs={"n_threads": 1, **model_options(merge)},
    )
    assert isinstance(llm._model, kvmerge.Llama)
    whole = llm.complete(TEXT).text
    # The second call starts from the same logits, and streams the same.
    assert "".join(part.delta for part in llm.stream_complete(TEXT)) == whole != ""
    llm._model.close()


@MERGES
def test_instructor(merge: str | None, llama: Factory) -> None:
    instructor = pytest.importorskip("instructor")
    pytest.importorskip("openai")
    from enum import Enum

    from pydantic import BaseModel

    class Letter(Enum):
        A, B, Z = "A", "B", "Z"

    class Seen(BaseModel):
        letter: Letter

    llm = llama(kv_merge=merge, kv_budget=0.5)
    create = instructor.patch(
        create=llm.create_chat_completion_openai_v1, mode=instructor.Mode.JSON_SCHEMA
    )
    prompt = pocket.make_prompt(np.random.default_rng(3), 1)
    seen = create(messages=prompt.messages(0), response_model=Seen, max_tokens=100, temperature=0)
    assert seen.letter in Letter


@MERGES
def test_outlines(merge: str | None, llama: Factory) -> None:
    outlines = pytest.importorskip("outlines")
    from typing import Literal

    llm = llama(mmproj=None, kv_merge=merge, kv_budget=0.5)
    model = outlines.from_llamacpp(llm)
    assert model(TEXT, Literal["red", "blue"], max_tokens=8) in ("red", "blue")
    assert "".join(model.stream(TEXT, Literal["red", "blue"], max_tokens=8)) in ("red", "blue")


@MERGES
def test_lm_format_enforcer(merge: str | None, llama: Factory) -> None:
    integration = pytest.importorskip("lmformatenforcer.integrations.llamacpp")
    from lmformatenforcer import RegexParser

    llm = llama(mmproj=None, kv_merge=merge, kv_budget=0.5)
    tokenizer = integration.build_token_enforcer_tokenizer_data(llm)
    parser = RegexParser(r" (red|blue) (box|door)")
    processor = integration.build_llamacpp_logits_processor(tokenizer, parser)
    processors = llama_cpp.LogitsProcessorList([processor])
    got = llm(TEXT, logits_processor=processors, max_tokens=20, temperature=0)
    colour, thing = got["choices"][0]["text"].split()
    assert colour in ("red", "blue")
    assert thing in ("box", "door")
