"""``kv_max_cells`` and ``keep_last_images``, through the class that users have."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import pytest

from conftest import make_llama
from kvmerge import Llama
from kvmerge.errors import OptionError, StateError
from kvmerge.pocket.tasks import make_prompt
from kvmerge.policies import Mosaic

N_CTX = 8192


def llama(**options: object) -> Llama:
    return make_llama(**({"kv_merge": "auto", "n_ctx": N_CTX} | options))


@pytest.fixture(scope="module")
def capped() -> Iterator[Llama]:
    with llama(kv_max_cells=512) as llm:
        yield llm


def many_pictures(turns: int) -> list[dict]:
    """A chat of several turns with 16 pictures each."""
    messages: list[dict] = []
    for turn in range(turns):
        prompt = make_prompt(np.random.default_rng(turn), 16, n_questions=1)
        messages += prompt.context()
    return [*messages, {"role": "user", "content": "What shape is in picture 3?"}]


def test_a_prompt_of_eight_times_the_cap_is_read_and_answered(
    capped: Llama, caplog: pytest.LogCaptureFixture
) -> None:
    assert capped.engine
    with caplog.at_level(logging.INFO, "kvmerge"):
        answer = capped.create_chat_completion(many_pictures(4), max_tokens=8, temperature=0)
    stats = capped.kv_stats()
    assert stats.tokens > 8 * 512
    assert stats.cells <= 512
    assert capped.engine.size() <= 512
    assert answer["choices"][0]["message"]["content"]
    assert answer["usage"]["prompt_tokens"] > 8 * 512
    assert answer["usage"]["prompt_tokens_details"]["cells"] <= 512
    merges = [record for record in caplog.records if record.message.startswith("merged ")]
    assert len(merges) == len(stats.merges) > 5
    assert all(merge.cells_before <= 512 for merge in stats.merges)


def test_generation_goes_on_past_the_cap(capped: Llama) -> None:
    assert capped.engine
    capped.reset()
    tokens = capped.tokenize(b"Anna saw a long box. It was cold in the kitchen.")
    made = []
    for token in capped.generate(tokens, temp=0):
        made.append(token)
        if len(made) == 700:
            break
    assert capped.n_tokens >= len(tokens) + 699
    assert capped.engine.size() <= 512
    assert capped.kv_stats().cells <= 512


def test_a_cap_in_bytes_is_the_same_as_in_cells() -> None:
    with llama(kv_max_cells=1024) as llm:
        assert llm.engine
        per_cell = llm.engine.bytes() / llm.engine.size()
        expected = llm.n_batch
    with llama(kv_max_cells=f"{1024 * per_cell / 2**20 + 0.001:.4f} MiB") as llm:
        assert llm.n_batch == expected == 256
        llm.create_chat_completion(many_pictures(2), max_tokens=1)
        assert llm.engine
        assert llm.engine.size() <= 1024


def test_a_cap_alone_merges_only_when_it_must() -> None:
    with llama(kv_budget=1.0, kv_max_cells=1024) as llm:
        few = make_prompt(np.random.default_rng(9), 4, n_questions=1)
        llm.create_chat_completion(few.messages(0), max_tokens=1)
        assert not llm.kv_stats().merges
        assert llm.kv_stats().cells == llm.kv_stats().tokens
        llm.create_chat_completion(many_pictures(3), max_tokens=1)
        assert llm.kv_stats().merges
        assert llm.kv_stats().cells <= 1024


def test_last_images_are_kept_whole() -> None:
    messages = many_pictures(1)
    with llama(kv_merge=Mosaic(), kv_budget=0.1, keep_last_images=2) as llm:
        llm.create_chat_completion(messages, max_tokens=1)
        assert llm.engine
        plan = llm.engine.plan(0, 0)
        segments = np.unique(plan.segment[plan.modality == 1])
        kept = [int((plan.fate[plan.segment == segment] >= 2).sum()) for segment in segments]
        assert kept[-2:] == [64, 64]
        assert max(kept[:-2]) < 16
        tokens = llm.kv_stats().tokens - 1
        assert llm.kv_stats().merges[-1].cells_after == pytest.approx(
            128 + 0.1 * (tokens - 128), abs=2
        )


def test_a_later_turn_reads_only_what_is_new_under_a_cap(capped: Llama) -> None:
    messages = many_pictures(2)
    first = capped.create_chat_completion(messages, max_tokens=4, temperature=0)
    said = first["choices"][0]["message"]
    later = [*messages, said, {"role": "user", "content": "What colour is in picture 1?"}]
    answer = capped.create_chat_completion(later, max_tokens=4, temperature=0)
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= first["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    "value", [0, 100, -1, 2.5, True, "many", "12 parsecs", "1KiB", float("nan")]
)
def test_a_bad_cap_names_what_is_accepted(value: object) -> None:
    with pytest.raises(OptionError, match=r"kv_max_cells=.*512"):
        llama(kv_max_cells=value)


@pytest.mark.parametrize("option", [{"kv_max_cells": 512}, {"keep_last_images": 1}])
def test_limits_need_a_way_to_merge(option: dict[str, int]) -> None:
    with pytest.raises(OptionError, match="needs kv_merge="):
        llama(kv_merge=None, **option)


def test_what_was_merged_cannot_be_gone_back_into(capped: Llama) -> None:
    capped.create_chat_completion(many_pictures(2), max_tokens=1)
    capped.n_tokens = 100
    with pytest.raises(StateError, match="merged since"):
        capped.eval([5])
    capped.reset()
    capped.eval([5])
