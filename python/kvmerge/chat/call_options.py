"""The options of a completion and of a chat, for editors and type checkers.

What they may be is checked by `kvmerge.options` when they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from llama_cpp.llama_grammar import LlamaGrammar


class _Sampling(TypedDict, total=False):
    max_tokens: int | None
    max_completion_tokens: int | None
    temperature: float
    top_p: float
    min_p: float
    typical_p: float
    top_k: int
    frequency_penalty: float
    presence_penalty: float
    repeat_penalty: float
    tfs_z: float
    mirostat_mode: int
    mirostat_tau: float
    mirostat_eta: float
    seed: int | None
    stop: str | Sequence[str] | None
    model: str | None
    logits_processor: Callable[..., Any] | Sequence[Callable[..., Any]] | None
    grammar: LlamaGrammar | None
    logit_bias: Mapping[int, float] | Mapping[str, float] | None
    stream_options: Mapping[str, bool] | None
    n: int | None


class CompletionOptions(_Sampling, total=False):
    """Options of `Llama.create_completion`, beside ``prompt`` and ``stream``."""

    suffix: str | None
    echo: bool
    logprobs: int | None
    stopping_criteria: Any


class ChatOptions(_Sampling, total=False):
    """Options of `Llama.create_chat_completion`, beside ``messages`` and ``stream``."""

    functions: Sequence[Mapping[str, Any]] | None
    function_call: str | Mapping[str, Any] | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    response_format: Mapping[str, Any] | None
    logprobs: bool | None
    top_logprobs: int | None
