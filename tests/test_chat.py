"""Chats with pictures."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp import mtmd_cpp
from llama_cpp.llama_chat_format import MTMDChatHandler

from conftest import Factory, answer
from gemma_model import write_gemma_mmproj
from kvmerge import Mosaic, errors, pocket
from kvmerge.chat.handler import ChatHandler
from kvmerge.prompt import placeholder_ids

PER_PICTURE = 64


def usage_of(llm: Any, messages: Any, **options: Any) -> tuple[str, dict[str, int]]:
    options = {"temperature": 0.0, "repeat_penalty": 1.0, "max_tokens": 24, **options}
    response = llm.create_chat_completion(messages, **options)
    usage = response["usage"]
    return response["choices"][0]["message"]["content"], usage["prompt_tokens_details"] | usage


def test_same_answers_as_the_stock_handler(llama: Factory, prompt: pocket.Prompt) -> None:
    handler = MTMDChatHandler(clip_model_path=str(pocket.mmproj_path()), verbose=False)
    stock = llama_cpp.Llama(
        str(pocket.model_path()),
        chat_handler=handler,
        n_ctx=2048,
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
    )
    try:
        llm = llama()
        for question in range(4):
            messages = prompt.messages(question)
            assert answer(llm, messages) == answer(stock, messages)
    finally:
        stock.close()


def test_answers_what_is_asked(llama: Factory) -> None:
    """The tasks that the pocket model has learnt; with 8 pictures they are nearly always right."""
    llm = llama()
    tasks = ("letter_of", "shape_at", "colour_at", "list_letters", "list_colours", "describe")
    points = []
    for seed in range(3):
        asked = pocket.make_prompt(np.random.default_rng([31, seed]), 5, tasks=tasks)
        for i, question in enumerate(asked.questions):
            said = answer(llm, asked.messages(i), max_tokens=64)
            points.append(pocket.score(question.task, said, question.answer))
    assert len(points) >= 18
    assert np.mean(points) >= 0.85


def test_stock_handler_in_our_class(llama: Factory, prompt: pocket.Prompt) -> None:
    handler = MTMDChatHandler(clip_model_path=str(pocket.mmproj_path()), verbose=False)
    theirs = llama(mmproj=None, chat_handler=handler)
    ours = llama()
    for question in range(3):
        messages = prompt.messages(question)
        assert answer(theirs, messages) == answer(ours, messages)
    with pytest.raises(errors.UnsupportedError, match="mmproj="):
        llama(mmproj=None, chat_handler=handler, kv_merge="flowmm")


def test_usage(llama: Factory, prompt: pocket.Prompt) -> None:
    llm = llama(kv_merge="flowmm", kv_budget=0.2)
    _, usage = usage_of(llm, prompt.messages(0), max_tokens=1)
    assert usage["image_tokens"] == 4 * PER_PICTURE
    assert usage["audio_tokens"] == usage["cached_tokens"] == 0
    assert usage["prompt_tokens"] > usage["image_tokens"]
    assert usage["cells"] == -(-usage["prompt_tokens"] // 5)


@pytest.mark.parametrize("merge", [None, "flowmm"])
def test_conversation_reads_only_what_is_new(
    merge: str | None,
    llama: Factory,
    prompt: pocket.Prompt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = llama(kv_merge=merge, kv_budget=0.2)
    encoded = []
    decode_chunk = ChatHandler.decode_chunk

    def counted(self: ChatHandler, chunk: Any, position: int) -> int:
        encoded.append(chunk.digest)
        return decode_chunk(self, chunk, position)

    monkeypatch.setattr(ChatHandler, "decode_chunk", counted)
    answers: list[str] = []
    tokens = 0
    for question in range(5):
        said, usage = usage_of(llm, prompt.messages(question, answers))
        if question:
            assert usage["cached_tokens"] >= tokens
            assert usage["prompt_tokens"] - usage["cached_tokens"] < 40
        tokens = usage["prompt_tokens"]
        answers.append(said)
    assert len(encoded) == len(set(encoded)) == 4
    stats = llm.kv_stats()
    assert len(stats.merges) == (5 if merge else 0)
    if merge:
        assert stats.merges[-1].cells_after == -(-stats.merges[-1].tokens // 5)
        assert llm.engine is not None and llm.engine.n_tokens() == stats.tokens


def test_conversation_without_merging_answers_as_if_read_afresh(
    llama: Factory, prompt: pocket.Prompt
) -> None:
    llm, answers = llama(), []
    for question in range(4):
        messages = prompt.messages(question, answers)
        answers.append(answer(llm, messages))
        assert answers[-1] == answer(llama(), messages)


def test_new_pictures_in_a_later_turn(llama: Factory, prompt: pocket.Prompt) -> None:
    more = pocket.make_prompt(np.random.default_rng(5), 2)
    llm = llama(kv_merge="flowmm", kv_budget=0.2)
    said, _ = usage_of(llm, prompt.messages(0))
    messages = [
        *prompt.messages(0),
        {"role": "assistant", "content": said},
        *more.messages(0),
    ]
    _, usage = usage_of(llm, messages)
    assert usage["cached_tokens"] >= 4 * PER_PICTURE
    assert usage["image_tokens"] == 6 * PER_PICTURE
    assert [span.end - span.start for span in llm.media_spans] == [PER_PICTURE] * 6


@pytest.mark.parametrize("merge", [None, "flowmm"])
def test_another_picture_is_noticed(
    merge: str | None,
    llama: Factory,
    prompt: pocket.Prompt,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "kvmerge")
    llm = llama(kv_merge=merge, kv_budget=0.2)
    answer(llm, prompt.messages(0))
    other = pocket.make_prompt(np.random.default_rng(6), 4)
    messages = prompt.messages(0)
    parts = [part for part in messages[0]["content"] if part["type"] == "image_url"]
    replaced = [part for part in other.content() if part["type"] == "image_url"]
    parts[2]["image_url"] = replaced[2]["image_url"]
    said, usage = usage_of(llm, messages)
    assert said == answer(llama(kv_merge=merge, kv_budget=0.2), messages)
    if merge:
        assert usage["cached_tokens"] == 0
        expected = f"reading all {usage['prompt_tokens']} tokens of the prompt again: picture 3 is"
        assert any(message.startswith(expected) for message in caplog.messages)
    else:
        assert usage["cached_tokens"] == llm.media_spans[2].start, "up to the picture, not into it"


def test_edited_last_question_keeps_the_pictures(llama: Factory, prompt: pocket.Prompt) -> None:
    llm = llama()
    answer(llm, prompt.messages(0))
    said, usage = usage_of(llm, prompt.messages(1))
    assert usage["cached_tokens"] > 4 * PER_PICTURE
    assert said == answer(llama(), prompt.messages(1))


def test_placeholders() -> None:
    digests = [hashlib.sha256(bytes([i])).hexdigest() for i in range(50)]
    ids = [tuple(placeholder_ids(digest, 16)) for digest in digests]
    assert len(set(ids)) == 50
    assert all(-(2**31) <= token < 0 for each in ids for token in each)
    assert placeholder_ids(digests[0], 16) == list(ids[0])
    assert placeholder_ids(digests[0], 4) == list(ids[0][:4])


def test_media_marker_in_a_message_is_only_text(llama: Factory, prompt: pocket.Prompt) -> None:
    llm = llama()
    messages = prompt.messages(0)
    messages[0]["content"].insert(0, {"type": "text", "text": "<__media__> <__image__>\n"})
    answer(llm, messages)
    assert len(llm.media_spans) == 4


@pytest.mark.parametrize("merge", [None, "flowmm"])
def test_streaming(merge: str | None, llama: Factory, prompt: pocket.Prompt) -> None:
    options: dict[str, Any] = {"temperature": 0.0, "repeat_penalty": 1.0, "max_tokens": 16}
    whole = llama(kv_merge=merge).create_chat_completion(prompt.messages(1), **options)
    chunks = list(
        llama(kv_merge=merge).create_chat_completion(prompt.messages(1), stream=True, **options)
    )
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant"}
    streamed = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert streamed == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]


SCHEMA = {
    "type": "object",
    "properties": {"letter": {"enum": ["A", "B", "Z"]}, "n": {"enum": [1, 2]}},
    "required": ["letter", "n"],
}


@pytest.mark.parametrize("merge", [None, "flowmm"])
def test_json_schema(merge: str | None, llama: Factory, prompt: pocket.Prompt) -> None:
    said = answer(
        llama(kv_merge=merge),
        prompt.messages(0),
        response_format={"type": "json_object", "schema": SCHEMA},
        max_tokens=100,
    )
    found = json.loads(said)
    assert found["letter"] in "ABZ"
    assert found["n"] in (1, 2)


@pytest.mark.parametrize("merge", [None, "flowmm"])
@pytest.mark.parametrize("stream", [False, True])
def test_tools(merge: str | None, stream: bool, llama: Factory, prompt: pocket.Prompt) -> None:
    tool = {
        "type": "function",
        "function": {"name": "note", "description": "Note it.", "parameters": SCHEMA},
    }
    response = llama(kv_merge=merge).create_chat_completion(
        prompt.messages(0),
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "note"}},
        temperature=0.0,
        max_tokens=100,
        stream=stream,
    )
    if stream:
        calls = [
            call
            for chunk in response
            for call in chunk["choices"][0]["delta"].get("tool_calls") or []
        ]
        arguments = "".join(call["function"]["arguments"] for call in calls)
        assert calls[0]["function"]["name"] == "note"
    else:
        call = response["choices"][0]["message"]["tool_calls"][0]
        arguments = call["function"]["arguments"]
        assert call["function"]["name"] == "note"
    assert json.loads(arguments)["n"] in (1, 2)


@pytest.mark.parametrize("merge", [None, "flowmm"])
def test_grammar(merge: str | None, llama: Factory, prompt: pocket.Prompt) -> None:
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= "red" | "blue"', verbose=False)
    assert answer(llama(kv_merge=merge), prompt.messages(0), grammar=grammar) in ("red", "blue")


def test_flow_and_segments(llama: Factory, prompt: pocket.Prompt) -> None:
    llm = llama(kv_merge="flowmm", kv_budget=0.2)
    answer(llm, prompt.messages(0), max_tokens=1)
    stats = llm.kv_stats()
    for layer in stats.flow:
        assert 0 < layer.rho < 1
        assert layer.rho == pytest.approx(layer.text_to_media + layer.media_to_text, abs=1e-5)
        assert layer.across == (layer.rho >= 0.25)
    assert llm.engine is not None
    plan = llm.engine.plan(0, 0)
    for number, span in enumerate(llm.media_spans):
        inside = (plan.order >= span.start) & (plan.order < span.end)
        assert (plan.modality[inside] == 1).all(), number
        assert len(set(plan.segment[inside].tolist())) == 1
    assert int((plan.modality == 1).sum()) == 4 * PER_PICTURE


def test_pictures_of_any_role(llama: Factory, prompt: pocket.Prompt) -> None:
    llm = llama()
    messages = prompt.messages(0)
    picture = next(part for part in messages[0]["content"] if part["type"] == "image_url")
    messages.insert(
        1, {"role": "assistant", "content": [{"type": "text", "text": "this: "}, picture]}
    )
    answer(llm, messages)
    assert len(llm.media_spans) == 5


def test_same_picture_twice_is_two_pictures(llama: Factory, prompt: pocket.Prompt) -> None:
    messages = prompt.messages(0)
    pictures = [part for part in messages[0]["content"] if part["type"] == "image_url"]
    pictures[1]["image_url"] = pictures[0]["image_url"]
    llm = llama()
    answer(llm, messages)
    spans = llm.media_spans
    assert len(spans) == 4
    assert spans[0].digest == spans[1].digest or spans[0].start != spans[1].start


def test_verbose_is_quiet_when_off(
    llama: Factory, prompt: pocket.Prompt, capfd: pytest.CaptureFixture[str]
) -> None:
    llm = llama(kv_merge="flowmm")
    answer(llm, prompt.messages(0))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_model_without_chat_template(llama: Factory, prompt: pocket.Prompt) -> None:
    llm = llama()
    del llm.metadata["tokenizer.chat_template"]
    with pytest.raises(errors.ModelError, match="no chat template"):
        answer(llm, prompt.messages(0))


def test_template_that_refuses(llama: Factory, prompt: pocket.Prompt) -> None:
    llm = llama()
    llm.metadata["tokenizer.chat_template"] = "{{ raise_exception('no system messages') }}"
    with pytest.raises(errors.OptionError, match="no system messages"):
        answer(llm, prompt.messages(0))


def test_template_that_forgets_pictures(llama: Factory, prompt: pocket.Prompt) -> None:
    llm = llama()
    llm.metadata["tokenizer.chat_template"] = "{{ messages[-1].content }}"
    with pytest.raises(errors.MediaError, match="shows 0 of the messages' 4"):
        answer(llm, prompt.messages(0))


def test_shorter_chat_after_a_merge(llama: Factory) -> None:
    """A cache is not cut right behind a token that was merged away: nothing could follow on it."""
    llm = llama(kv_merge=Mosaic(window=1, keep=1, sinks=1), kv_budget=5)
    for contents in (["", ""], [""], ["Hello"], ["", "Hello"]):
        messages = [{"role": "user", "content": content} for content in contents]
        assert isinstance(answer(llm, messages, max_tokens=1), str)
        assert llm.kv_stats().tokens == llm.n_tokens


@pytest.fixture
def non_causal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tokens of a picture see each other, as in Gemma 3: the pocket model does not ask."""
    decode = ChatHandler.decode_chunk

    def decoded(self: ChatHandler, chunk: Any, position: int) -> int:
        llama_cpp.llama_set_causal_attn(self._llama().ctx, False)  # type: ignore[misc]
        try:
            return decode(self, chunk, position)
        finally:
            llama_cpp.llama_set_causal_attn(self._llama().ctx, True)  # type: ignore[misc]

    monkeypatch.setattr(mtmd_cpp, "mtmd_decode_use_non_causal", lambda *_: True)
    monkeypatch.setattr(ChatHandler, "decode_chunk", decoded)


def logits_of(llm: Any, messages: Any) -> Any:
    llm.create_chat_completion(messages, max_tokens=1)
    logits = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
    return np.ctypeslib.as_array(logits, (llm.n_vocab(),)).copy()


@pytest.mark.usefixtures("non_causal")
def test_non_causal_picture_is_read_at_once(llama: Factory, prompt: pocket.Prompt) -> None:
    """Its tokens see each other, however few tokens are read at a time otherwise."""
    messages = prompt.messages(0)
    expected = logits_of(llama(), messages)
    small = llama()
    small.n_batch = 24
    assert np.allclose(logits_of(small, messages), expected, atol=1e-3)
    pieces = llama(n_batch=64, n_ubatch=64)
    assert np.allclose(logits_of(pieces, messages), expected, atol=1e-3)
    capped = llama(kv_merge="auto", kv_budget=1.0, kv_max_cells=512)
    capped.n_batch = 24
    assert np.allclose(logits_of(capped, messages), expected, atol=1e-3)


@pytest.mark.usefixtures("non_causal")
@pytest.mark.parametrize("options", [{"n_batch": 32}, {"n_ubatch": 32}, {"n_batch": 63}])
def test_non_causal_picture_that_does_not_fit(
    options: dict[str, int], llama: Factory, prompt: pocket.Prompt
) -> None:
    llm = llama(**options)
    with pytest.raises(errors.OptionError, match="picture of 64 tokens.*must be at least 64"):
        answer(llm, prompt.messages(0))
    assert isinstance(answer(llm, [{"role": "user", "content": "Hello"}]), str)


@pytest.mark.usefixtures("non_causal")
def test_non_causal_pictures_under_a_cap(llama: Factory) -> None:
    asked = pocket.make_prompt(np.random.default_rng(3), 12)
    llm = llama(kv_merge="auto", kv_max_cells=512)
    llm.n_batch = 24
    assert isinstance(answer(llm, asked.messages(0)), str)
    assert llm.engine is not None and llm.engine.size() <= 512


@pytest.mark.parametrize("options", [{}, {"n_batch": 64}, {"n_ubatch": 32}])
def test_batches_fit_a_picture_that_is_read_at_once(
    options: dict[str, int], llama: Factory, tmp_path: Path
) -> None:
    """A projector like that of Gemma 3, whose pictures take more tokens than a batch has."""
    n_tokens = write_gemma_mmproj(tmp_path / "gemma.gguf", side=192)
    assert n_tokens == 576
    llm = llama(mmproj=tmp_path / "gemma.gguf", **options)
    assert llama_cpp.llama_n_batch(llm.ctx) == llama_cpp.llama_n_ubatch(llm.ctx) == n_tokens
    picture = pocket.render_picture("red", "circle", "A", np.random.default_rng(0))
    messages = [{"role": "user", "content": [{"type": "image", "image": picture}, "What is it?"]}]
    assert isinstance(answer(llm, messages, max_tokens=1), str)
    assert [span.end - span.start for span in llm.media_spans] == [n_tokens]
    expected = logits_of(llm, messages)
    llm.reset()
    llm.n_batch = 100
    assert np.allclose(logits_of(llm, messages), expected, atol=1e-3)


def test_batches_that_a_context_cannot_have(llama: Factory, tmp_path: Path) -> None:
    write_gemma_mmproj(tmp_path / "gemma.gguf", side=192)
    llm = llama(mmproj=tmp_path / "gemma.gguf", n_ctx=512)
    picture = pocket.render_picture("red", "circle", "A", np.random.default_rng(0))
    messages = [{"role": "user", "content": [{"type": "image", "image": picture}, "What is it?"]}]
    with pytest.raises(errors.ContextLengthError, match="n_ctx=512"):
        answer(llm, messages)


def test_batches_stay_where_pictures_are_causal(llama: Factory) -> None:
    llm = llama(n_batch=32, n_ubatch=32)
    assert llama_cpp.llama_n_batch(llm.ctx) == 32
