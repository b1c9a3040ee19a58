"""What options of llama-cpp-python may be, checked before they reach C.

llama-cpp-python passes numbers on as they are: a wrong type is an error of ctypes there, and a
number out of range ends the process.  Each option has one row here; a test goes through the
signatures, so that an option that a new release adds has to be given one.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from .chat.grammar import check_schema
from .chat.tool_calls import check_tools
from .errors import OptionError, UnknownOptionError, UnsupportedError, did_you_mean

Check = Callable[[str, Any], Any]

INT32 = 2**31 - 1
MOST_TOKENS = 2**24
"""The longest context that can be asked for; llama.cpp counts bytes of larger ones wrongly."""
MOST_THREADS = 512
"""ggml ends the process if there are more."""
COLDEST = 1e-4
"""A temperature below this is greedy: the logits divided by it are no numbers any more."""


def _error(name: str, value: object, accepted: str) -> OptionError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return OptionError(f"{name}={shown}: {name} must be {accepted}")


def whole(low: int, high: int = INT32) -> Check:
    """Whole numbers from `low` to `high`, NumPy's too."""

    def check(name: str, value: Any) -> int:
        if (
            isinstance(value, (bool, np.bool_))
            or not isinstance(value, Integral)
            or not low <= int(value) <= high
        ):
            bounds = f"of at least {low}" if high == INT32 else f"from {low} to {high}"
            raise _error(name, value, f"a whole number {bounds}")
        return int(value)

    return check


def number(low: float = -1e30, high: float = 1e30) -> Check:
    """Finite numbers from `low` to `high`."""

    def check(name: str, value: Any) -> float:
        if (
            isinstance(value, (bool, np.bool_))
            or not isinstance(value, Real)
            or not low <= value <= high  # whole numbers too large for a float as well
        ):
            bounds = "a finite number" if (low, high) == (-1e30, 1e30) else "a number"
            if low != -1e30 or high != 1e30:
                bounds += f" from {low:g} to {high:g}"
            raise _error(name, value, bounds)
        return float(value)

    return check


def _temperature(name: str, value: Any) -> float:
    warmth = float(number(-1e4, 1e4)(name, value))
    return 0.0 if 0 < warmth < COLDEST else warmth


def switch(name: str, value: Any) -> bool:
    """Return True or False, or raise."""
    if isinstance(value, (bool, np.bool_)) or (isinstance(value, Integral) and value in (0, 1)):
        return bool(value)
    raise _error(name, value, "True or False")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _error(name, value, "a text")
    return value


def _callable(name: str, value: Any) -> Any:
    if not callable(value):
        raise _error(name, value, "something that can be called")
    return value


def _anything(name: str, value: Any) -> Any:
    return value


def or_none(check: Check) -> Check:
    """Take what a check takes, or None."""
    return lambda name, value: None if value is None else check(name, value)


def _one_of(*values: int) -> Check:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) not in values:
            raise _error(name, value, f"one of {', '.join(map(str, values))}")
        return int(value)

    return check


def _shares(name: str, value: Any) -> list[float]:
    import llama_cpp

    most = int(llama_cpp.LLAMA_MAX_DEVICES)
    is_list = isinstance(value, Sequence) or (isinstance(value, np.ndarray) and value.ndim == 1)
    if isinstance(value, (str, bytes)) or not is_list:
        raise _error(name, value, "a list of numbers, one a device")
    if len(value) > most:
        raise _error(name, value, f"a list of at most {most} numbers, one a device")
    return [float(number(0)(name, share)) for share in value]


def _overrides(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _error(name, value, "a dict of names and values")
    for key, item in value.items():
        # The name's field in C has 128 bytes with its end.
        if not isinstance(key, str) or len(key.encode("utf-8", "replace")) > 127:
            raise _error(name, value, "a dict whose keys are texts of at most 127 bytes")
        if isinstance(item, str):
            fits = len(item.encode("utf-8", "replace")) <= 127
        elif isinstance(item, int):
            fits = -(2**63) <= item < 2**63
        else:
            fits = isinstance(item, float)
        if not fits:
            raise _error(f"{name}[{key!r}]", item, "a bool, a number, or a text of 127 bytes")
    return dict(value)


def _numa(name: str, value: Any) -> bool | int:
    if isinstance(value, bool):
        return value
    return int(_one_of(0, 1, 2, 3, 4)(name, value))


def _seed(name: str, value: Any) -> int:
    return int(whole(-1, 2**32 - 1)(name, value))


def _tokenizer(name: str, value: Any) -> Any:
    if not all(callable(getattr(value, method, None)) for method in ("tokenize", "detokenize")):
        raise _error(name, value, "a llama_cpp.LlamaTokenizer, or another with its methods")
    return value


def _prompt(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return value
    is_list = isinstance(value, Sequence) or (isinstance(value, np.ndarray) and value.ndim == 1)
    if isinstance(value, (bytes, bytearray, memoryview)) or not is_list:
        raise _error(name, value, "a text or a list of tokens")
    check = whole(-INT32)
    return [
        token if type(token) is int and -INT32 <= token <= INT32 else check(f"{name}[{i}]", token)
        for i, token in enumerate(value)
    ]


def _stops(name: str, value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    # Every answer would end at an empty text before it begins.
    if isinstance(stops, (list, tuple)) and all(isinstance(stop, str) and stop for stop in stops):
        return list(stops)
    raise _error(name, value, "a text or a list of texts, none of them empty")


def _biases(name: str, value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise _error(name, value, "a dict of token ids and numbers")
    biases = {}
    for key, bias in value.items():
        try:
            token = int(key) if isinstance(key, str) else whole(0)(name, key)
        except ValueError:
            token = -1
        if token < 0:
            raise _error(name, value, "a dict whose keys are token ids")
        is_ban = isinstance(bias, Real) and float(bias) == -math.inf
        biases[token] = -math.inf if is_ban else float(number()(f"{name}[{token}]", bias))
    return biases


def _calls(name: str, value: Any) -> Any:
    if callable(value) or (
        isinstance(value, (list, tuple)) and all(callable(item) for item in value)
    ):
        return value if isinstance(value, (list, tuple)) else [value]
    raise _error(name, value, "a list of what can be called")


def _criteria(name: str, value: Any) -> Any:
    # llama-cpp-python's list of criteria can itself be called; a plain list cannot.
    if callable(value):
        return value
    criteria = _calls(name, value)
    return lambda tokens, logits: any(stops(tokens, logits) for stops in criteria)


def _grammar(name: str, value: Any) -> Any:
    from llama_cpp.llama_grammar import LlamaGrammar

    if not isinstance(value, LlamaGrammar):
        raise _error(name, value, "a llama_cpp.LlamaGrammar")
    return value


def _list(name: str, value: Any) -> Any:
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, Mapping) for v in value):
        raise _error(name, value, "a list of dicts")
    return list(value)


def _tool_choice(name: str, value: Any) -> Any:
    if isinstance(value, Mapping) and isinstance(value.get("function"), Mapping):
        return value
    if isinstance(value, str) and value in ("none", "auto", "required"):
        return value
    accepted = '"none", "auto", "required", or {"type": "function", "function": {"name": ...}}'
    raise _error(name, value, accepted)


def _function_call(name: str, value: Any) -> Any:
    if isinstance(value, Mapping) and "name" in value:
        return value
    if isinstance(value, str) and value in ("none", "auto"):
        return value
    raise _error(name, value, '"none", "auto" or {"name": ...}')


def _response_format(name: str, value: Any) -> Any:
    kinds = '{"type": "text"}, "json_object" or "json_schema" with its schema'
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "json_schema":
        named = value.get("json_schema")
        schema = named.get("schema") if isinstance(named, Mapping) else value.get("schema")
        if not isinstance(schema, Mapping):
            raise _error(name, value, 'of the form {"json_schema": {"schema": {...}}}')
        # What llama-cpp-python calls the same thing.
        return {"type": "json_object", "schema": check_schema(name, schema)}
    if kind not in ("text", "json_object"):
        raise _error(name, value, kinds)
    if kind == "json_object" and value.get("schema") is not None:
        return {**value, "schema": check_schema(name, value["schema"])}
    return dict(value)


def _stream_options(name: str, value: Any) -> dict[str, bool]:
    if not isinstance(value, Mapping) or value.keys() - {"include_usage", "include_obfuscation"}:
        raise _error(name, value, '{"include_usage": True} or {"include_usage": False}')
    return {key: switch(f"{name}[{key!r}]", each) for key, each in value.items()}


LLAMA: dict[str, Check] = {
    "n_gpu_layers": whole(-1),
    "split_mode": _one_of(0, 1, 2, 3),
    "main_gpu": whole(0, 255),
    "tensor_split": or_none(_shares),
    "vocab_only": switch,
    "use_mmap": switch,
    "use_mlock": switch,
    "kv_overrides": or_none(_overrides),
    "seed": _seed,
    "n_ctx": whole(0, MOST_TOKENS),
    "n_batch": whole(1),
    "n_ubatch": whole(1),
    "n_threads": or_none(whole(0, MOST_THREADS)),
    "n_threads_batch": or_none(whole(0, MOST_THREADS)),
    "rope_scaling_type": or_none(_one_of(-1, 0, 1, 2, 3)),
    "pooling_type": _one_of(-1, 0, 1, 2, 3, 4),
    "attention_type": _one_of(-1, 0, 1),
    "rope_freq_base": number(0),
    "rope_freq_scale": number(0),
    "yarn_ext_factor": number(),
    "yarn_attn_factor": number(),
    "yarn_beta_fast": number(),
    "yarn_beta_slow": number(),
    "yarn_orig_ctx": whole(0),
    "logits_all": switch,
    "embedding": switch,
    "offload_kqv": switch,
    "flash_attn": switch,
    "op_offload": or_none(switch),
    "swa_full": or_none(switch),
    "no_perf": switch,
    "last_n_tokens_size": whole(-1, MOST_TOKENS),
    "lora_base": or_none(_text),
    "lora_scale": number(),
    "lora_path": or_none(_text),
    "numa": _numa,
    "chat_format": or_none(_text),
    "chat_handler": or_none(_callable),
    "draft_model": or_none(_callable),
    "tokenizer": or_none(_tokenizer),
    "type_k": _anything,  # by name too: `llama._cache_type`
    "type_v": _anything,
    "spm_infill": switch,
    "verbose": switch,
}
"""Options of ``llama_cpp.Llama``."""

_SAMPLING: dict[str, Check] = {
    "max_tokens": or_none(whole(-INT32)),
    "temperature": _temperature,
    "top_p": number(),
    "min_p": number(),
    "typical_p": number(),
    "top_k": whole(-INT32),
    "frequency_penalty": number(-1e4, 1e4),
    "presence_penalty": number(-1e4, 1e4),
    "repeat_penalty": number(1e-4, 1e4),
    "tfs_z": number(),
    "mirostat_mode": _one_of(0, 1, 2),
    "mirostat_tau": number(0, 1e4),
    "mirostat_eta": number(0, 1e4),
    "seed": or_none(_seed),
    "stop": or_none(_stops),
    "stream": switch,
    "model": or_none(_text),
    "logits_processor": or_none(_calls),
    "grammar": or_none(_grammar),
    "logit_bias": or_none(_biases),
}

COMPLETION: dict[str, Check] = _SAMPLING | {
    "prompt": _prompt,
    "suffix": or_none(_text),
    "echo": switch,
    "logprobs": or_none(whole(0)),
    "stopping_criteria": or_none(_criteria),
}
"""Options of ``llama_cpp.Llama.create_completion``."""

CHAT: dict[str, Check] = _SAMPLING | {
    "messages": _anything,  # by `messages.check_messages`
    "functions": or_none(_list),
    "function_call": or_none(_function_call),
    "tools": or_none(check_tools),
    "tool_choice": or_none(_tool_choice),
    "response_format": or_none(_response_format),
    "logprobs": or_none(switch),
    "top_logprobs": or_none(whole(0)),
}
"""Options of ``llama_cpp.Llama.create_chat_completion``."""


OPENAI: dict[str, Check] = {
    "max_completion_tokens": or_none(whole(-INT32)),
    "stream_options": or_none(_stream_options),
    "n": or_none(whole(1)),
}
"""Options that OpenAI has for every answer, and llama-cpp-python has not."""


def checked(table: Mapping[str, Check], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as llama-cpp-python takes them; those that have no row are left alone.

    Raises
    ------
    OptionError
        If one has another type or is out of its range.
    """
    return {
        name: table[name](name, value) if name in table else value
        for name, value in options.items()
    }


def _choose_logprobs(given: dict[str, Any]) -> None:
    """Give a chat the log probabilities of its tokens also where no others are asked for."""
    if given.get("logprobs"):
        given["top_logprobs"] = given.get("top_logprobs") or 0
    elif given.get("top_logprobs"):
        raise OptionError("top_logprobs needs logprobs=True beside it")


def of_call(
    method: Callable[..., Any],
    table: Mapping[str, Check],
    arguments: Sequence[Any],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the arguments of a call of llama-cpp-python by name, checked.

    What OpenAI calls ``max_completion_tokens`` is ``max_tokens`` in it; ``stream_options`` is left
    for `kvmerge.chat.request`.

    Parameters
    ----------
    method : callable
        The method of ``llama_cpp.Llama``.
    table : mapping
        What its options may be.
    arguments, options
        What it is called with, without the object itself.

    Raises
    ------
    OptionError
        If an option has another type or is out of its range.
    UnknownOptionError
        If there is no such option.
    UnsupportedError
        If OpenAI has it, and llama-cpp-python does not.
    """
    names = [name for name in inspect.signature(method).parameters if name != "self"]
    if len(arguments) > len(names):
        raise UnknownOptionError(f"{method.__name__} takes {len(names)} arguments at most")
    given = dict(zip(names, arguments, strict=False))
    if twice := given.keys() & options.keys():
        raise UnknownOptionError(f"{method.__name__} got {min(twice)} twice")
    given |= options
    known = [*names, *OPENAI]
    for name in given:
        if name not in known:
            raise UnknownOptionError(
                f"{method.__name__} has no option {name!r}.{did_you_mean(name, known)}"
            )
    given = checked(table | OPENAI, given)
    if "top_logprobs" in table:
        _choose_logprobs(given)
    if (most := given.pop("max_completion_tokens", None)) is not None:
        given["max_tokens"] = most
    if (answers := given.pop("n", None) or 1) != 1:
        raise UnsupportedError(
            f"n={answers!r}: one answer is written at a time, so n must be 1; ask again for another"
        )
    return given
