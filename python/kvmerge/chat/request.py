"""A call in OpenAI's words: what llama-cpp-python is asked, and what its answer lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_cpp.llama import Llama as StockLlama

from .. import options as option_table
from . import tool_calls

Usage = Callable[[], dict[str, Any]]
"""Returns what the completion that has just ended has read and written."""


@dataclass(frozen=True)
class Request:
    """A completion or a chat.

    Attributes
    ----------
    options : dict
        What llama-cpp-python is asked, checked.
    includes_usage : bool
        Whether a stream ends with what it has read and written.
    writes_call : bool
        Whether the text of the answer is a call of a tool.
    """

    options: dict[str, Any]
    includes_usage: bool = False
    writes_call: bool = False

    @classmethod
    def completion(cls, arguments: Sequence[Any], options: Mapping[str, Any]) -> Request:
        """Return the request of a call of `Llama.create_completion`."""
        method, table = StockLlama.create_completion, option_table.COMPLETION
        return cls(*_taken(option_table.of_call(method, table, arguments, options)))

    @classmethod
    def chat(
        cls, arguments: Sequence[Any], options: Mapping[str, Any], chat_format: str | None
    ) -> Request:
        """Return the request of a call of `Llama.create_chat_completion`."""
        method, table = StockLlama.create_chat_completion, option_table.CHAT
        given, includes_usage = _taken(option_table.of_call(method, table, arguments, options))
        given, writes_call = tool_calls.choose(given, chat_format)
        return cls(given, includes_usage, writes_call)

    def shape(self, answer: Any, usage: Usage) -> Any:
        """Return an answer, or a stream, as it was asked for."""
        if not isinstance(answer, Iterator):
            return tool_calls.call(answer) if self.writes_call else answer
        if self.writes_call:
            answer = tool_calls.streamed_call(answer)
        return _with_usage(answer, usage) if self.includes_usage else answer


def _taken(options: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return options without `stream_options`, and whether these ask for the usage."""
    about = options.pop("stream_options", None) or {}
    return options, about.get("include_usage", False)


def _with_usage(chunks: Iterator[Any], usage: Usage) -> Iterator[Any]:
    last: dict[str, Any] = {}
    for last in chunks:
        yield {**last, "usage": None}
    yield {**last, "choices": [], "usage": usage()}
