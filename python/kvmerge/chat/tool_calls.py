"""Tools that an answer has to call: one schema over all of them, and calls from what it wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import OptionError, UnsupportedError
from .grammar import check_schema

_BEGINNING = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*')


def check_tools(name: str, value: Any) -> list[dict[str, Any]]:
    """Return tools with a schema of their parameters each.

    Raises
    ------
    OptionError
        If one is no function with a name.
    """
    accepted = (
        f'{name} must be a list of {{"type": "function", "function": {{"name": ..., "parameters": '
        "{...}}}"
    )
    if not isinstance(value, (list, tuple)):
        raise OptionError(f"{name} is of type {type(value).__name__}: {accepted}")
    return [_tool(f"{name}[{i}]", tool, accepted) for i, tool in enumerate(value)]


def _tool(where: str, tool: Any, accepted: str) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise OptionError(f"{where} is no function with a name: {accepted}")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, Mapping):
        raise OptionError(f"{where} has parameters that are no JSON schema: {accepted}")
    return {**tool, "function": {**function, "parameters": dict(parameters)}}


def choose(options: dict[str, Any], chat_format: str | None) -> tuple[dict[str, Any], bool]:
    """Return options in which a tool that has to be called is chosen, as llama-cpp-python does it.

    Parameters
    ----------
    options : dict
        Checked options of a chat.
    chat_format : str or None
        The chat format, where no handler of this package writes the prompt.

    Returns
    -------
    options : dict
        Options that llama-cpp-python takes.
    writes_call : bool
        Whether the answer will be a call in JSON, which `call` and `streamed_call` turn into a
        tool call.

    Raises
    ------
    OptionError
        If there is no tool of that name, or none at all.
    UnsupportedError
        If the chat format has a way of its own to write calls.
    """
    choice = options.get("tool_choice")
    tools: Sequence[Mapping[str, Any]] = options.get("tools") or ()
    names = [tool["function"]["name"] for tool in tools]
    if isinstance(choice, Mapping) and tools and choice["function"].get("name") not in names:
        raise OptionError(f"tool_choice={dict(choice)}: the tools are {', '.join(names)}")
    if choice == "required" and not tools:
        raise OptionError("tool_choice='required' needs tools=, which has none")
    for tool in tools:
        if choice == "required" or (
            isinstance(choice, Mapping)
            and choice["function"].get("name") == tool["function"]["name"]
        ):
            check_schema(f"tool {tool['function']['name']!r}", tool["function"]["parameters"])
    if choice != "required":
        return options, False
    if len(tools) == 1:
        one = {"type": "function", "function": {"name": names[0]}}
        return {**options, "tool_choice": one}, False
    if chat_format is not None and "function" in chat_format:
        raise UnsupportedError(
            f"tool_choice='required' among several tools does not go with chat_format="
            f"{chat_format!r}: name one tool"
        )
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                "arguments": tool["function"]["parameters"],
            },
            "required": ["name", "arguments"],
        }
        for tool in tools
    ]
    form = {"type": "json_object", "schema": {"anyOf": calls}}
    return {**options, "tool_choice": None, "response_format": form, "grammar": None}, True


def call(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return an answer whose text is a call in JSON as one that calls the tool."""
    choice = answer["choices"][0]
    calls, whole = _calls(choice["message"]["content"], answer["id"])
    message = {**choice["message"], "content": None, "tool_calls": calls}
    reason = "tool_calls" if whole else choice["finish_reason"]
    return {**answer, "choices": [{**choice, "message": message, "finish_reason": reason}]}


def streamed_call(chunks: Iterator[Any]) -> Iterator[Any]:
    """Return a stream whose text is a call in JSON as one that calls the tool, in one part."""
    text, last = "", None
    for last in chunks:
        choice = last["choices"][0]
        if "role" in choice["delta"]:
            yield last
        text += choice["delta"].get("content") or ""
    if last is None:
        return
    choice = last["choices"][0]
    calls, whole = _calls(text, last["id"])
    delta = {"tool_calls": [{"index": i, **each} for i, each in enumerate(calls)]}
    yield {**last, "choices": [{**choice, "delta": delta, "finish_reason": None}]}
    reason = "tool_calls" if whole else choice["finish_reason"]
    yield {**last, "choices": [{**choice, "delta": {}, "finish_reason": reason}]}


def _calls(text: str, answer_id: str) -> tuple[list[dict[str, Any]], bool]:
    """Return the call that a text is, and whether it was written to its end."""
    try:
        written = json.loads(text)
        name, arguments, whole = written["name"], json.dumps(written["arguments"]), True
    except (ValueError, KeyError, TypeError):
        # An answer that max_tokens has cut; the schema lets the name come first.
        begun = _BEGINNING.match(text)
        if begun is None:
            return [], False
        name, arguments, whole = json.loads(begun[1]), text[begun.end() :], False
    function = {"name": name, "arguments": arguments}
    return [{"id": f"call_0_{answer_id}", "type": "function", "function": function}], whole
