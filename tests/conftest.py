"""Fixtures of all tests: the real library and the model in the package."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvmerge
from kvmerge import pocket
from media_work import Work

Factory = Callable[..., kvmerge.Llama]

GPU_LAYERS = int(os.environ.get("KVMERGE_TEST_GPU_LAYERS", "0"))
"""-1: model and cache lie on a device (`tools/rpc_tests.py`)."""


@pytest.fixture(scope="session")
def model() -> Path:
    return pocket.model_path()


@pytest.fixture(scope="session")
def mmproj() -> Path:
    return pocket.mmproj_path()


def make_llama(*arguments: Any, **options: Any) -> kvmerge.Llama:
    """Return the pocket model with pictures, unless told otherwise."""
    # The model is tiny: a second thread costs more than it brings on a busy machine.
    options = {
        "mmproj": pocket.mmproj_path(),
        "n_ctx": 2048,
        "n_threads": 1,
        "n_threads_batch": 1,
        "verbose": False,
        "kv_trace": True,
        "n_gpu_layers": GPU_LAYERS,
        **options,
    }
    return kvmerge.Llama(*(arguments or (pocket.model_path(),)), **options)


@pytest.fixture
def llama() -> Iterator[Factory]:
    """Make models that are closed after the test."""
    made: list[kvmerge.Llama] = []

    def make(*arguments: Any, **options: Any) -> kvmerge.Llama:
        made.append(make_llama(*arguments, **options))
        return made[-1]

    yield make
    for llm in made:
        llm.close()
    gc.collect()


@pytest.fixture(
    params=[True] if GPU_LAYERS else [False, True], ids=lambda on: "device" if on else "host"
)
def as_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run a test a second time with the CPU treated as any other device."""
    if request.param:
        monkeypatch.setenv("KVMERGE_AS_DEVICE", "1")
    return bool(request.param)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    """Count what is decoded and encoded."""
    return Work(monkeypatch)


@pytest.fixture
def prompt() -> pocket.Prompt:
    """Four pictures with text between them, and ten questions."""
    return pocket.make_prompt(np.random.default_rng(20), 4)


def answer(llm: kvmerge.Llama, messages: Any, **options: Any) -> str:
    """Return the greedy answer to a chat."""
    options = {"temperature": 0.0, "repeat_penalty": 1.0, "max_tokens": 24, **options}
    return llm.create_chat_completion(messages, **options)["choices"][0]["message"]["content"]
