"""Without a flag of merging `kvmerge serve` answers as upstream's llama-server does."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from kvmerge import pocket
from serving import Server, command, is_built, serving
from stock_library import stock_server

pytestmark = [
    pytest.mark.slow,  # upstream's server is built first
    pytest.mark.skipif(
        not (is_built() or os.environ.get("CI")), reason="built with KVMERGE_SERVER=OFF"
    ),
]

OWN = ("id", "created", "timings", "model", "system_fingerprint", "generation_settings")
"""What differs from one answer to the next."""


def told(server: Server) -> list[Any]:
    """Return the answers to a chat about pictures, its continuation, and a text with its odds."""
    prompt = pocket.make_prompt(np.random.default_rng(91), 4, n_questions=2)
    answers: list[Any] = []
    said: list[str] = []
    for i in range(2):
        messages = prompt.messages(i, said)
        answer = server.chat(messages, logprobs=True, top_logprobs=5)
        said.append(answer.text)
        answers.append({key: value for key, value in answer.items() if key not in OWN})
        pieces = [chunk["choices"] for chunk in server.stream(messages)]
        answers.append([choice[0]["delta"] for choice in pieces if choice])
    text = {"prompt": "red blue", "n_predict": 16, "temperature": 0.0, "n_probs": 5}
    answer = server.post("/completion", text)
    answers.append({key: value for key, value in answer.items() if key not in OWN})
    answers.append(server.post("/tokenize", {"content": "red blue"}))
    return answers


def test_answers_are_those_of_upstream() -> None:
    flags = ("--parallel", "2", "--kv-unified", "--cache-ram", "0")
    ours = command(*flags)
    stock = [os.fspath(stock_server()), "--model", *ours[ours.index("serve") + 1 :]]
    with serving(line=stock) as server:
        expected = told(server)
    with serving(line=ours) as server:
        assert told(server) == expected
