"""Tokens, positions and cells are three numbers: a model with M-RoPE tells them apart."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pytest

import kvmerge
from conftest import Factory, answer
from kvmerge import errors, pocket
from mrope_model import PICTURE_POSITIONS, PICTURE_TOKENS, write_mrope_model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_mrope_model(tmp_path_factory.mktemp("mrope"))


@pytest.fixture
def mrope(files: tuple[Path, Path], llama: Factory) -> Factory:
    def make(**options: object) -> kvmerge.Llama:
        return llama(files[0], mmproj=files[1], image_max_tokens=PICTURE_TOKENS, **options)

    return make


@pytest.mark.parametrize("merge", [None, "flowmm"])
def test_pictures_advance_fewer_positions(
    merge: str | None, mrope: Factory, prompt: pocket.Prompt
) -> None:
    llm = mrope(kv_merge=merge, kv_budget=0.5)
    response = llm.create_chat_completion(prompt.messages(0), max_tokens=1, temperature=0.0)
    stats = llm.kv_stats()
    assert [span.end - span.start for span in llm.media_spans] == [PICTURE_TOKENS] * 4
    assert stats.tokens == response["usage"]["prompt_tokens"]
    assert stats.positions == stats.tokens - 4 * (PICTURE_TOKENS - PICTURE_POSITIONS)
    assert stats.cells == (stats.tokens if merge is None else -(-stats.tokens // 2))


def test_conversation_continues_at_the_right_position(
    mrope: Factory, prompt: pocket.Prompt
) -> None:
    llm, answers = mrope(), []
    for question in range(3):
        messages = prompt.messages(question, answers)
        answers.append(answer(llm, messages))
        assert answers[-1] == answer(mrope(), messages)
    cached = llm.create_chat_completion(prompt.messages(3, answers), max_tokens=1)
    assert cached["usage"]["prompt_tokens_details"]["cached_tokens"] > 4 * PICTURE_TOKENS


def test_same_logits_whatever_the_batch_size(mrope: Factory, prompt: pocket.Prompt) -> None:
    logits = []
    for n_batch in (512, 32, 7):
        llm = mrope(n_batch=n_batch)
        llm.create_chat_completion(prompt.messages(0), max_tokens=1, temperature=0.0)
        logits.append(np.array(llm._ctx.get_logits()[: llm.n_vocab()]))
    np.testing.assert_allclose(logits[1], logits[0], rtol=0.05, atol=0.02)
    np.testing.assert_allclose(logits[2], logits[0], rtol=0.05, atol=0.02)


def test_cut_after_pictures(mrope: Factory, prompt: pocket.Prompt) -> None:
    llm = mrope()
    answer(llm, prompt.messages(0))
    assert answer(llm, prompt.messages(1)) == answer(mrope(), prompt.messages(1))


def test_merged_conversation(
    mrope: Factory, prompt: pocket.Prompt, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvmerge")
    llm, answers = mrope(kv_merge="flowmm", kv_budget=0.3), []
    for question in range(4):
        answers.append(answer(llm, prompt.messages(question, answers), max_tokens=5))
    stats = llm.kv_stats()
    assert len(stats.merges) == 4
    assert stats.cells < stats.positions < stats.tokens
    line = [message for message in caplog.messages if message.startswith("merged")][-1]
    tokens, positions = map(int, re.findall(r"(\d+) tokens, (\d+) positions", line)[0])
    assert stats.merges[-1].cells_before < positions < tokens == stats.merges[-1].tokens


def test_tokens_count_against_n_ctx(mrope: Factory) -> None:
    # More tokens than n_ctx, and fewer positions.
    pictures = pocket.make_prompt(np.random.default_rng(8), 12, distractor_tokens=0)
    stats = mrope().kv_stats()
    llm = mrope(n_ctx=256)
    with pytest.raises(errors.ContextLengthError, match=r"192 of them pictures.*n_ctx=256"):
        answer(llm, pictures.messages(0))
    assert llm.kv_stats() == stats


def test_state_keeps_positions(mrope: Factory, prompt: pocket.Prompt) -> None:
    llm = mrope()
    first = answer(llm, prompt.messages(0))
    state = llm.save_state()
    before = llm.kv_stats()
    llm.reset()
    llm.create_completion("old box", max_tokens=1)
    llm.load_state(state)
    assert llm.kv_stats() == before
    messages = prompt.messages(1, [first])
    assert answer(llm, messages) == answer(mrope(), messages)
