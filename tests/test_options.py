"""Every option with wrong types and extreme numbers, from the signatures."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp.llama import Llama as StockLlama

import kvmerge
from conftest import Factory
from kvmerge import errors, options

METHODS = {
    "__init__": options.LLAMA,
    "create_completion": options.COMPLETION,
    "create_chat_completion": options.CHAT,
}

TRIED = """
import sys
import kvmerge  # before llama_cpp, which it may carry
from llama_cpp.llama import Llama as Stock
import inspect, kvmerge
from decimal import Decimal
from fractions import Fraction
import numpy as np
from kvmerge import errors, options, pocket

VALUES = ["None", "True", "-1", "0", "1", "'x'", "''", "2**31", "2**32", "2**63", "10**12",
          "-2**31 - 1", "1.5", "1e-45", "1e39", "float('nan')", "float('inf')", "-float('inf')",
          "b'x'", "[]", "['x']", "{}", "{'x': 1}", "{-1: 1}", "{2**40: 1}", "{5: float('nan')}",
          "object()", "[float('nan')]", "(1,) * 1000", "1j", "10**400", "chr(0xD800)",
          "'a' + chr(0)", "np.array(1)", "np.array([1, 2])", "np.float32(0.5)", "Decimal(1)",
          "Fraction(1, 2)", "[[1]]", "[10**6]", "[-1]", "[2**40]", "[1.5]", "[None]"]
method, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
owner = kvmerge.Llama if sys.argv[4] == "ours" else Stock
OPENAI = list(kvmerge.options.OPENAI) if sys.argv[1] != "__init__" else []
names = [name for name, parameter in inspect.signature(getattr(owner, method)).parameters.items()
         if name not in ("self", "kwargs", "options", "args")]
names += OPENAI
small = dict(n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
llm = None if method == "__init__" else kvmerge.Llama(pocket.model_path(), **small)
for name in names[first:last]:
    for value in VALUES:
        print(name, ascii(value), flush=True)
        try:
            given = {name: eval(value)}
            if method == "__init__":
                policy = {} if name == "kv_merge" else {"kv_merge": "auto"}
                if name.startswith("image_"):
                    policy["mmproj"] = pocket.mmproj_path()
                model = {"model_path": pocket.model_path()}
                kvmerge.Llama(**(model | small | policy | given)).close()
            elif method == "create_completion":
                answer = llm.create_completion(**({"prompt": "Hello", "max_tokens": 2} | given))
                list(answer) if given.get("stream") else 0
            else:
                chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
                answer = llm.create_chat_completion(**(chat | given))
                list(answer) if given.get("stream") else 0
        except errors.KVMergeError:
            pass
print("whole", len(names))
"""


def tried(method: str, whose: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", TRIED, method, "0", "999", whose],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    at = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"{done.returncode} at {at}: {done.stderr[-1500:]}"
    return at[0]


@pytest.mark.parametrize("method", METHODS)
def test_every_option_has_a_row(method: str) -> None:
    parameters = set(inspect.signature(getattr(StockLlama, method)).parameters)
    assert parameters - {"self", "model_path", "kwargs"} == set(METHODS[method])


def test_types_name_every_option() -> None:
    """What an editor is told is what is taken."""
    from kvmerge.chat.call_options import ChatOptions, CompletionOptions

    for known, table, apart in (
        (CompletionOptions, options.COMPLETION, {"prompt", "stream"}),
        (ChatOptions, options.CHAT, {"messages", "stream"}),
    ):
        assert set(known.__annotations__) == {*table, *options.OPENAI} - apart


@pytest.mark.parametrize("method", METHODS)
def test_any_value_ends_well(method: str, tmp_path: Path) -> None:
    assert tried(method, "stock", tmp_path).startswith("whole")


def test_any_value_of_ours_ends_well(tmp_path: Path) -> None:
    assert tried("__init__", "ours", tmp_path).startswith("whole")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"n_batch": -1}, "n_batch=-1: n_batch must be a whole number of at least 1"),
        ({"n_batch": None}, "n_batch=None"),
        ({"n_ctx": 2**31}, "n_ctx must be a whole number from 0 to"),
        ({"kv_merge": "auto", "kv_max_cells": 10**12}, "at most 2147483647"),
        ({"kv_trace": "x"}, "kv_trace='x': kv_trace must be True or False"),
        ({"n_threads": 513}, "n_threads must be a whole number from 0 to 512"),
        ({"seed": 2**32}, "seed must be"),
        ({"tokenizer": 5}, "tokenizer must be a llama_cpp.LlamaTokenizer"),
        ({"mmproj": "x.gguf", "image_min_tokens": 2**32}, "image_min_tokens must be a whole"),
    ],
)
def test_numbers_out_of_range(given: dict[str, Any], said: str, model: Any) -> None:
    with pytest.raises(errors.OptionError) as caught:
        kvmerge.Llama(model, **given)
    assert said in str(caught.value)


def test_numbers_of_numpy(llama: Factory) -> None:
    llm = llama(mmproj=None, n_ctx=np.int64(512), n_batch=np.int32(64), kv_trace=np.True_)
    answer = llm.create_completion(
        "Hello", max_tokens=np.int64(2), temperature=np.float32(0), top_k=np.uint8(40)
    )
    assert answer["usage"]["completion_tokens"] <= 2


def test_options_of_openai(llama: Factory) -> None:
    llm = llama(mmproj=None)
    chat = [{"role": "user", "content": "Hello"}]
    answer = llm.create_chat_completion(chat, max_completion_tokens=2, n=1)
    assert answer["usage"]["completion_tokens"] <= 2
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = llm.create_chat_completion(chat, response_format=form, max_tokens=200)
    assert json.loads(answer["choices"][0]["message"]["content"]) == {"a": 1}
    for given in (
        {"n": 2},
        {"tool_choice": "sometimes"},
        {"response_format": {"type": "yaml"}},
        {"logprobs": True},
        {"temprature": 1.0},
    ):
        with pytest.raises(errors.KVMergeError, match=next(iter(given))):
            llm.create_chat_completion(chat, max_tokens=2, **given)
    json.dumps(answer)
