"""What OpenAI's API has and llama-cpp-python lacks: usage of streams, required tools, going on."""

from __future__ import annotations

import json
from typing import Any

import llama_cpp
import numpy as np
import pytest

import kvmerge
from conftest import Factory
from kvmerge import errors, pocket

HELLO = [{"role": "user", "content": "The code of the old box is five six seven. What is it?"}]
GREEDY = {"temperature": 0.0, "repeat_penalty": 1.0, "max_tokens": 12}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"n": {"enum": numbers}},
                "required": ["n"],
            },
        },
    }
    for name, numbers in (("alpha", [1, 2]), ("beta", [3, 4]))
]


@pytest.fixture(params=[(None, True), ("flowmm", True), (None, False), ("flowmm", False)])
def llm(request: pytest.FixtureRequest, llama: Factory) -> kvmerge.Llama:
    """Chats of the handler with pictures and of a chat format, merging and not."""
    merge, pictures = request.param
    options = {} if pictures else {"mmproj": None}
    return llama(kv_merge=merge, kv_budget=0.5, logits_all=True, **options)


def said(answer: Any) -> str:
    return answer["choices"][0]["message"]["content"]


def counted(usage: Any) -> list[int]:
    return [usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]]


def test_a_stream_ends_with_its_usage(llm: kvmerge.Llama) -> None:
    whole = llm.create_chat_completion(HELLO, **GREEDY)
    *parts, last = llm.create_chat_completion(HELLO, **GREEDY, **USAGE)
    assert counted(last["usage"]) == counted(whole["usage"])
    assert last["usage"]["prompt_tokens_details"].keys() == {
        "cached_tokens", "cells", "image_tokens", "audio_tokens"
    }  # fmt: skip
    assert last["choices"] == []
    assert all(part["usage"] is None and part["choices"] for part in parts)
    text = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
    assert text == said(whole)
    whole = llm.create_completion("The code of", **GREEDY)
    *_, last = llm.create_completion("The code of", **GREEDY, **USAGE)
    assert counted(last["usage"]) == counted(whole["usage"])
    without = llm.create_chat_completion(HELLO, **GREEDY, stream=True)
    assert not any("usage" in part for part in without)


def test_usage_of_an_answer_that_is_stopped(llm: kvmerge.Llama) -> None:
    whole = llm.create_completion("The code of", **GREEDY, logit_bias={257: -100})
    stop = whole["choices"][0]["text"].split()[1]
    stopped = {**GREEDY, "stop": [stop], "logit_bias": {257: -100}}
    whole = llm.create_completion("The code of", **stopped)
    *_, last = llm.create_completion("The code of", **stopped, **USAGE)
    assert 0 < whole["usage"]["completion_tokens"] < GREEDY["max_tokens"]
    assert counted(last["usage"]) == counted(whole["usage"])


def test_answers_are_json(llm: kvmerge.Llama) -> None:
    answer = llm.create_chat_completion(HELLO, **GREEDY, logprobs=True, top_logprobs=3)
    first = json.loads(json.dumps(answer))["choices"][0]["logprobs"]["content"][0]
    assert len(first["top_logprobs"]) >= 3
    assert all(type(each["logprob"]) is float for each in first["top_logprobs"])
    answer = llm.create_completion("The code of", **GREEDY, logprobs=2, echo=True)
    numbers = json.loads(json.dumps(answer))["choices"][0]["logprobs"]["token_logprobs"]
    assert numbers[0] is None
    assert all(number <= 0 for number in numbers[1:])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n_tools", [1, 2])
def test_a_tool_that_has_to_be_called(llm: kvmerge.Llama, n_tools: int, stream: bool) -> None:
    answer = llm.create_chat_completion(
        HELLO,
        tools=TOOLS[:n_tools],
        tool_choice="required",
        stream=stream,
        **{**GREEDY, "max_tokens": 100},
    )
    if stream:
        parts = list(answer)
        assert parts[0]["choices"][0]["delta"]["role"] == "assistant"
        calls = [
            call for part in parts for call in part["choices"][0]["delta"].get("tool_calls") or []
        ]
        name = calls[0]["function"]["name"]
        arguments = "".join(call["function"]["arguments"] for call in calls)
        reason = parts[-1]["choices"][0]["finish_reason"]
    else:
        choice = answer["choices"][0]
        assert choice["message"]["content"] is None
        (call,) = choice["message"]["tool_calls"]
        assert call["type"] == "function"
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        reason = choice["finish_reason"]
    assert reason == "tool_calls"
    numbers = {"alpha": (1, 2), "beta": (3, 4)}
    assert json.loads(arguments)["n"] in numbers[name]


def test_a_call_that_is_cut(llm: kvmerge.Llama) -> None:
    options = {**GREEDY, "tools": TOOLS, "tool_choice": "required"}
    seen = []
    for most in range(2, 60, 3):
        choice = llm.create_chat_completion(HELLO, **{**options, "max_tokens": most})["choices"][0]
        calls = choice["message"]["tool_calls"]
        seen.append((choice["finish_reason"], len(calls)))
    # Before its name is whole, in its arguments, and whole.
    assert list(dict.fromkeys(seen)) == [("length", 0), ("length", 1), ("tool_calls", 1)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tool_choice": "required"}, "tool_choice='required' needs tools="),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice='sometimes'"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "gamma"}}},
            "the tools are alpha, beta",
        ),
        ({"tools": [{"type": "function"}]}, r"tools\[0\] is no function with a name"),
        ({"tools": [{"function": {"name": "x", "parameters": []}}]}, "no JSON schema"),
        ({"n": 2}, "n=2: one answer is written at a time"),
        ({"stream_options": {"usage": True}}, "stream_options="),
        ({"stream_options": {"include_usage": "x"}}, "must be True or False"),
    ],
)
def test_what_is_refused(given: dict[str, Any], message: str, llama: Factory) -> None:
    with pytest.raises(errors.KVMergeError, match=message):
        llama(mmproj=None).create_chat_completion(HELLO, max_tokens=2, **given)


def test_a_tool_without_parameters(llama: Factory) -> None:
    tool = {"type": "function", "function": {"name": "now"}}
    answer = llama().create_chat_completion(
        HELLO, tools=[tool], tool_choice="required", **{**GREEDY, "max_tokens": 100}
    )
    arguments = answer["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"]
    assert json.loads(arguments) == {}


def test_going_on_from_what_the_assistant_said(llm: kvmerge.Llama) -> None:
    whole = said(llm.create_chat_completion(HELLO, **GREEDY))
    tokens = llm.input_ids.tolist()
    first, *rest = whole.split()
    for content in (first, [{"type": "text", "text": first}]):
        llm.reset()
        begun = [*HELLO, {"role": "assistant", "content": content}]
        answer = llm.create_chat_completion(begun, **GREEDY)
        n = answer["usage"]["prompt_tokens"]
        assert llm.input_ids[:n].tolist() == tokens[:n]
        assert llm.detokenize(tokens[:n]).decode().endswith(first)
        if llm.policy is None:  # else the next word comes from the full cache, not a merged one
            assert said(answer).split()[: len(rest)] == rest
    llm.reset()
    # An empty message is the beginning of an answer.
    begun = [*HELLO, {"role": "assistant", "content": ""}]
    assert said(llm.create_chat_completion(begun, **GREEDY)) == whole


def test_going_on_from_a_call(llm: kvmerge.Llama) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    begun = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
    with pytest.raises(errors.OptionError, match="message 2, the last one, calls a tool"):
        llm.create_chat_completion(begun, **GREEDY)


def test_going_on_where_the_template_shows_nothing(llama: Factory) -> None:
    llm = llama()
    llm.metadata["tokenizer.chat_template"] = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    begun = [*HELLO, {"role": "assistant", "content": "The"}]
    with pytest.raises(errors.OptionError, match="cannot be gone on from"):
        llm.create_chat_completion(begun, **GREEDY)


def test_a_context_takes_the_same(llama: Factory) -> None:
    prompt = pocket.make_prompt(np.random.default_rng(3), 1)
    with llama(kv_merge="auto").context(prompt.messages(0)[:-1] or HELLO) as ctx:
        *_, last = ctx.ask("What is it?", **GREEDY, **USAGE)
        assert last["usage"]["total_tokens"] > 0
        called = ctx.ask("What?", tools=TOOLS, tool_choice="required", max_tokens=100)
        assert called["choices"][0]["message"]["tool_calls"]
        with pytest.raises(errors.UnknownOptionError, match="temprature"):
            ctx.ask("What?", temprature=1)


def test_errors_of_logits_processors(llm: kvmerge.Llama) -> None:
    calls = []

    def fails(tokens: Any, scores: Any) -> Any:
        calls.append(len(tokens))
        if len(calls) == 3:
            raise KeyError("mine")
        return scores

    with pytest.raises(KeyError, match="mine"):
        llm.create_completion("The code of", logits_processor=[fails], logit_bias={257: -100})
    assert len(calls) == 3
    right = llm.create_completion("The code of", **GREEDY)["choices"][0]["text"]
    llm.reset()
    assert llm.create_completion("The code of", **GREEDY)["choices"][0]["text"] == right


def test_biases_beside_a_logits_processor(llm: kvmerge.Llama) -> None:
    only = llm.tokenize(b" box", add_bos=False)[0]
    options = {**GREEDY, "max_tokens": 2, "logit_bias": {only: 1e3}}
    text = [
        llm.create_completion("The code of", **options, logits_processor=processors)
        for processors in (None, [lambda tokens, scores: scores])
    ]
    assert [each["choices"][0]["text"] for each in text] == [" box box"] * 2


# What cannot be done is refused, instead of something else being done.


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"$ref": "#/nowhere"},
        {"$ref": "https://127.0.0.1:1/schema"},
        {"type": "string", "pattern": "^[a-$"},
        {"not": {}},
        {"enum": []},
        {"anyOf": []},
        {"type": "string", "maxLength": 2500},
        {"type": "string", "maxLength": 30000},
    ],
    ids=lambda schema: json.dumps(schema),
)
def test_a_schema_that_no_answer_can_follow(schema: Any, llama: Factory) -> None:
    """Of the last three, sampling would end the process."""
    llm = llama(mmproj=None)
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    for given in (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}},
        {"response_format": {"type": "json_object", "schema": schema}},
        {"tools": [tool], "tool_choice": "required"},
        {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "f"}}},
    ):
        with pytest.raises(errors.OptionError, match="JSON schema"):
            llm.create_chat_completion(HELLO, max_tokens=8, **given)
    assert said(llm.create_chat_completion(HELLO, **GREEDY))


@pytest.mark.parametrize(
    "rules", ["", "nonsense", "root ::= )", "other ::= [a-z]", "root ::= root", "root ::= (" * 3000]
)
def test_a_grammar_that_cannot_be_read(rules: str, llama: Factory) -> None:
    grammar = llama_cpp.LlamaGrammar.from_string(rules)
    llm = llama(mmproj=None)
    with pytest.raises(errors.OptionError, match="grammar"):
        llm.create_completion("Hello", grammar=grammar, max_tokens=2)
    with pytest.raises(errors.OptionError, match="grammar"):
        llm.create_chat_completion(HELLO, grammar=grammar, max_tokens=2)


def test_brackets_in_the_text_of_a_grammar_are_not_counted(llama: Factory) -> None:
    rules = 'root ::= "' + "(" * 3000 + '" [(] # ' + "(" * 3000
    grammar = llama_cpp.LlamaGrammar.from_string(rules)
    answer = llama(mmproj=None).create_completion("Hello", grammar=grammar, max_tokens=3)
    assert set(answer["choices"][0]["text"]) == {"("}


def test_log_probabilities_of_a_chat(llm: kvmerge.Llama) -> None:
    """Also where no others than those of the answer itself are asked for."""
    for top in (None, 0, 2):
        answer = llm.create_chat_completion(HELLO, logprobs=True, top_logprobs=top, **GREEDY)
        tokens = answer["choices"][0]["logprobs"]["content"]
        assert tokens
        assert all(token["logprob"] <= 0 for token in tokens)
        assert all(len(token["top_logprobs"]) in (top or 0, (top or 0) + 1) for token in tokens)
    with pytest.raises(errors.OptionError, match="top_logprobs needs logprobs=True"):
        llm.create_chat_completion(HELLO, top_logprobs=2, **GREEDY)


def test_an_answer_does_not_end_at_an_empty_text(llm: kvmerge.Llama) -> None:
    for stop in ("", [""], ["x", ""]):
        with pytest.raises(errors.OptionError, match="stop must be"):
            llm.create_chat_completion(HELLO, stop=stop, **GREEDY)
    assert said(llm.create_chat_completion(HELLO, stop=[], **GREEDY))
