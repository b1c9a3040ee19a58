"""Messages that are read once and asked about many times."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from conftest import Factory
from kvmerge import errors, pocket
from kvmerge.chat.handler import ChatHandler

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12}
TEXT = [{"role": "user", "content": "The code of the old box is 123. " * 10}]
MERGE = pytest.mark.parametrize("merge", [None, "flowmm"])


def text_of(response: Any) -> str:
    return response["choices"][0]["message"]["content"]


def streamed(chunks: Iterator[Any]) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Digests of the pictures that were encoded."""
    digests: list[str] = []
    decode_chunk = ChatHandler.decode_chunk

    def counted(self: ChatHandler, chunk: Any, position: int) -> int:
        digests.append(chunk.digest)
        return decode_chunk(self, chunk, position)

    monkeypatch.setattr(ChatHandler, "decode_chunk", counted)
    return digests


@pytest.fixture
def put_back(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of the snapshots that were put back from memory."""
    from kvmerge.cache import KVCache, Snapshot

    sizes: list[int] = []
    original = KVCache.restore

    def counted(self: KVCache, snapshot: Snapshot) -> None:
        sizes.append(len(snapshot.tokens))
        original(self, snapshot)

    monkeypatch.setattr(KVCache, "restore", counted)
    return sizes


@MERGE
def test_questions_are_independent(
    merge: str | None,
    llama: Factory,
    prompt: pocket.Prompt,
    encoded: list[str],
    put_back: list[int],
) -> None:
    llm = llama(kv_merge=merge, kv_budget=0.2)
    questions = [question.text for question in prompt.questions[:5]]
    with llm.context(prompt.context(), **GREEDY) as ctx:
        n = llm.n_tokens
        responses = [ctx.ask(question) for question in questions]
        answers = [text_of(response) for response in responses]
        again = [text_of(ctx.ask(question)) for question in reversed(questions)]
        assert again == answers[::-1]
        assert streamed(ctx.ask(questions[0], stream=True)) == answers[0]
    assert len(encoded) == len(set(encoded)) == 4
    assert put_back == [], "what a question adds is cut off, nothing is copied"
    assert len(llm.kv_stats().merges) == (1 if merge else 0), "questions are not merged"
    for response in responses:
        usage = response["usage"]
        details = usage["prompt_tokens_details"]
        assert details["cached_tokens"] == n
        assert details["image_tokens"] == 4 * 64
        held = llm.kv_stats().merges[0].cells_after if merge else n
        added = usage["total_tokens"] - n
        # The last token of an answer is not read when nothing comes after it.
        assert details["cells"] - held in (added - 1, added)


def test_same_as_a_chat_without_merging(llama: Factory, prompt: pocket.Prompt) -> None:
    llm, plain = llama(), llama()
    with llm.context(prompt.context()) as ctx:
        for number, question in enumerate(prompt.questions[:4]):
            expected = plain.create_chat_completion(prompt.messages(number), **GREEDY)
            found = ctx.ask(question.text, **GREEDY)
            assert text_of(found) == text_of(expected)
            assert found["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]
            assert plain.input_ids[: plain.n_tokens].tolist() == (
                llm.input_ids[: llm.n_tokens].tolist()
            )


@pytest.mark.parametrize(
    "options", [{}, {"mmproj": None}, {"mmproj": None, "chat_format": "chatml"}]
)
@MERGE
def test_text_only(merge: str | None, options: dict[str, Any], llama: Factory) -> None:
    llm = llama(kv_merge=merge, kv_budget=0.3, **options)
    with llm.context(TEXT, **GREEDY) as ctx:
        n, merges = llm.n_tokens, len(llm.kv_stats().merges)
        assert merges == (1 if merge else 0)
        responses = [ctx.ask(f"What is the code of the {thing}?") for thing in ("box", "door")]
        again = ctx.ask("What is the code of the box?", stream=True)
        assert streamed(again) == text_of(responses[0])
        assert len(llm.kv_stats().merges) == merges
    for response in responses:
        assert response["usage"]["prompt_tokens_details"]["cached_tokens"] == n


def test_every_policy(llama: Factory, prompt: pocket.Prompt, encoded: list[str]) -> None:
    for name in ("mosaic", "h2o", "streaming"):
        encoded.clear()
        llm = llama(kv_merge=name, kv_budget=0.3)
        with llm.context(prompt.context(), **GREEDY) as ctx:
            first = text_of(ctx.ask(prompt.questions[0].text))
            ctx.ask(prompt.questions[1].text)
            assert text_of(ctx.ask(prompt.questions[0].text)) == first
        assert len(encoded) == 4


def test_messages_as_a_question(llama: Factory, prompt: pocket.Prompt, encoded: list[str]) -> None:
    llm = llama(kv_merge="flowmm")
    more = pocket.make_prompt(np.random.default_rng(5), 1)
    question = prompt.questions[0].text
    with llm.context(prompt.context(), **GREEDY) as ctx:
        first = text_of(ctx.ask(question))
        assert text_of(ctx.ask([{"role": "user", "content": question}])) == first
        ctx.ask(
            [
                {"role": "user", "content": question},
                {"role": "assistant", "content": first},
                {"role": "user", "content": "Describe every picture."},
            ]
        )
        ctx.ask([{"role": "assistant", "content": "Go on."}, {"role": "user", "content": question}])
        assert len(encoded) == 4
        shown = ctx.ask(more.messages(0))
        assert shown["usage"]["prompt_tokens_details"]["image_tokens"] == 5 * 64
        assert len(encoded) == 5, "only the picture of the question"
        assert text_of(ctx.ask(question)) == first


@MERGE
def test_other_use_in_between(
    merge: str | None,
    llama: Factory,
    prompt: pocket.Prompt,
    encoded: list[str],
    put_back: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "kvmerge")
    llm = llama(kv_merge=merge, kv_budget=0.3)
    question = prompt.questions[0].text
    with llm.context(prompt.context(), **GREEDY) as ctx:
        first = text_of(ctx.ask(question))
        disturbances = (
            lambda: llm.create_chat_completion(TEXT, max_tokens=2),
            lambda: llm.create_completion(llm.tokenize(b"The old box") * 20, max_tokens=2),
            llm.reset,
            lambda: setattr(llm, "n_tokens", 3),
        )
        for number, disturb in enumerate(disturbances, 1):
            disturb()
            assert text_of(ctx.ask(question)) == first
            assert len(put_back) == number
    assert len(encoded) == 4
    assert any("putting them back from memory" in message for message in caplog.messages)


def test_merges_in_between_are_noticed(
    llama: Factory, prompt: pocket.Prompt, put_back: list[int]
) -> None:
    llm = llama(kv_merge="flowmm", kv_budget=0.3)
    question = prompt.questions[0].text
    with llm.context(prompt.context(), **GREEDY) as ctx:
        first = text_of(ctx.ask(question))
        assert llm.engine is not None
        llm.engine.merge(40)  # behind the back of everything
        assert text_of(ctx.ask(question)) == first
        assert len(put_back) == 1


def test_merges_under_a_cap(llama: Factory, prompt: pocket.Prompt, encoded: list[str]) -> None:
    options: dict[str, Any] = {"kv_merge": "flowmm", "kv_budget": 0.5, "n_ctx": 4096}
    llm = llama(kv_max_cells=512, **options)
    question = prompt.questions[0].text
    with llm.context(prompt.context(), **GREEDY) as ctx:
        merges = llm.kv_stats().merges
        first = text_of(ctx.ask(question))
        assert llm.kv_stats().merges == merges
        ctx.ask("red " * 500)
        assert len(llm.kv_stats().merges) > len(merges), "the question did not fit"
        assert text_of(ctx.ask(question)) == first
        assert llm.kv_stats().merges == merges
    assert len(encoded) == 4


def test_nested_contexts(llama: Factory, prompt: pocket.Prompt, encoded: list[str]) -> None:
    llm = llama(kv_merge="flowmm", kv_budget=0.3)
    other = pocket.make_prompt(np.random.default_rng(5), 2)
    question = prompt.questions[0].text
    with llm.context(prompt.context(), **GREEDY) as outer:
        first = text_of(outer.ask(question))
        with llm.context(other.context(), **GREEDY) as inner:
            inside = text_of(inner.ask(question))
            assert text_of(outer.ask(question)) == first
            assert text_of(inner.ask(question)) == inside
        further = [*prompt.context(), *other.context()]
        assert text_of(outer.ask(question)) == first
        with llm.context(further, **GREEDY) as inner:
            inner.ask(question)
        assert text_of(outer.ask(question)) == first
    assert len(encoded) == 4 + 2 + 2, "a context that goes on from another reads what is new"


def test_after_the_block(llama: Factory, prompt: pocket.Prompt, encoded: list[str]) -> None:
    llm = llama(kv_merge="flowmm", kv_budget=0.3)
    ctx = llm.context(prompt.context(), **GREEDY)
    with pytest.raises(errors.StateError, match="inside its `with` block"):
        ctx.ask("?")
    with pytest.raises(ZeroDivisionError), ctx:
        first = text_of(ctx.ask(prompt.questions[0].text))
        raise ZeroDivisionError
    with pytest.raises(errors.StateError, match="inside its `with` block"):
        ctx.ask("?")
    usage = llm.create_chat_completion(prompt.messages(0), **GREEDY)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > 4 * 64
    with ctx:
        assert isinstance(text_of(ctx.ask(prompt.questions[0].text)), str)
    assert isinstance(first, str)
    assert len(encoded) == 4
    llm.close()
    with pytest.raises(errors.ClosedError):
        ctx.__enter__()


def test_interrupted_questions(
    llama: Factory, prompt: pocket.Prompt, monkeypatch: pytest.MonkeyPatch, encoded: list[str]
) -> None:
    llm = llama(kv_merge="flowmm", kv_budget=0.3)
    question = prompt.questions[6].text
    with llm.context(prompt.context(), **GREEDY) as ctx:
        first = text_of(ctx.ask(question))
        decode = llm._ctx.decode
        for after in range(4):
            left = iter([True] * after)

            def interrupted(batch: Any, left: Iterator[bool] = left) -> None:
                decode(batch)
                if not next(left, False):
                    raise KeyboardInterrupt

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(llm._ctx, "decode", interrupted)
                ctx.ask(question, max_tokens=30)
            assert text_of(ctx.ask(question)) == first
        for _ in zip(range(2), ctx.ask(question, stream=True), strict=False):
            pass
        assert text_of(ctx.ask(question)) == first
    assert len(encoded) == 4


def test_stream_that_is_overtaken(llama: Factory, prompt: pocket.Prompt) -> None:
    llm = llama(kv_merge="flowmm", kv_budget=0.3)
    with llm.context(prompt.context(), **GREEDY) as ctx:
        stream = ctx.ask(prompt.questions[0].text, stream=True)
        next(stream)
        first = text_of(ctx.ask(prompt.questions[1].text))
        with pytest.raises(errors.StateError, match="before this stream ended"):
            next(stream)
        assert text_of(ctx.ask(prompt.questions[1].text)) == first


@MERGE
def test_threads_ask_contexts(merge: str | None, llama: Factory) -> None:
    """Each question is one call, from putting the state back to the end of the answer."""
    llm = llama(kv_merge=merge)
    prompts = [pocket.make_prompt(np.random.default_rng(seed), 2) for seed in (1, 2)]
    wrong: list[Any] = []
    with ExitStack() as stack:
        contexts = [stack.enter_context(llm.context(p.context(), **GREEDY)) for p in prompts]
        questions = [p.questions[0].text for p in prompts]
        asked = list(zip(contexts, questions, strict=True))
        right = [text_of(context.ask(question)) for context, question in asked]

        def ask(first: int) -> None:
            for i in range(first, first + 6):
                context, question = asked[i % 2]
                try:
                    if i % 3:
                        answer = text_of(context.ask(question))
                    else:
                        answer = streamed(context.ask(question, stream=True))
                    if answer != right[i % 2]:
                        wrong.append(answer)
                except errors.KVMergeError as error:
                    wrong.append(error)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_questions_that_do_not_fit(llama: Factory, prompt: pocket.Prompt) -> None:
    llm = llama(kv_merge="flowmm", kv_budget=0.3, n_ctx=512)
    question = prompt.questions[0].text
    with llm.context(prompt.context(), **GREEDY) as ctx:
        first = text_of(ctx.ask(question))
        with pytest.raises(errors.ContextLengthError, match="n_ctx=512"):
            ctx.ask("red " * 300)
        with pytest.raises(errors.MediaError):
            ctx.ask([{"role": "user", "content": [{"type": "image_url", "image_url": "no.png"}]}])
        with pytest.raises(errors.UnknownOptionError, match="Did you mean 'temperature'"):
            ctx.ask(question, temprature=0.0)
        with pytest.raises(errors.OptionError, match="question is empty"):
            ctx.ask("")
        assert text_of(ctx.ask(question)) == first


def test_bad_contexts(llama: Factory, prompt: pocket.Prompt) -> None:
    with pytest.raises(errors.OptionError, match="messages is empty"):
        llama().context([])
    with pytest.raises(errors.UnknownOptionError, match="Did you mean 'temperature'"):
        llama().context(prompt.context(), temprature=0.0)
    with (
        pytest.raises(errors.MediaError, match="without a vision part"),
        llama(mmproj=None).context(prompt.context()),
    ):
        pass


ALTERNATING = """{%- for m in messages -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles alternate') }}
{%- endif -%}<|{{ m.role }}|>
{%- if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{{ part.text }}
{%- endfor %}{% endif %}<|end|>{%- endfor -%}<|assistant|>"""


@MERGE
def test_template_that_wants_roles_to_alternate(
    merge: str | None, llama: Factory, prompt: pocket.Prompt, encoded: list[str]
) -> None:
    llm = llama(kv_merge=merge, kv_budget=0.3)
    llm.metadata["tokenizer.chat_template"] = ALTERNATING
    context, question = prompt.context()[-1:], prompt.questions[0].text
    with llm.context(context, **GREEDY) as ctx:
        first = text_of(ctx.ask(question))
        ctx.ask("What else?")
        assert text_of(ctx.ask(question)) == first
        assert len(encoded) == 4
        n = llm.n_tokens
    content = [*context[0]["content"], {"type": "text", "text": "\n" + question}]
    if merge is None:
        whole = llm.create_chat_completion([{"role": "user", "content": content}], **GREEDY)
        assert text_of(whole) == first
        assert llm.n_tokens == n


def test_template_that_changes_the_beginning(
    llama: Factory, prompt: pocket.Prompt, encoded: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvmerge")
    llm = llama(kv_merge="flowmm", kv_budget=0.3)
    template = llm.metadata["tokenizer.chat_template"]
    tools = "{% if tools %}tools {% endif %}"
    llm.metadata["tokenizer.chat_template"] = tools + template
    tool = {"type": "function", "function": {"name": "note", "parameters": {"type": "object"}}}
    question = prompt.questions[0].text
    with llm.context(prompt.context(), **GREEDY) as ctx:
        first = text_of(ctx.ask(question))
        ctx.ask(question, tools=[tool])
        assert any("in another way" in message for message in caplog.messages)
        assert len(encoded) == 8
        assert text_of(ctx.ask(question)) == first
        assert len(encoded) == 8
