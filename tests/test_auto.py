"""`auto`: text is left alone, pictures shrink, and what it answers is right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvmerge import Llama, pocket, presets
from kvmerge.errors import BudgetError
from kvmerge.native.binding import Engine

TEXT = "The code of the old box is five six seven. The new door is red. " * 12
LONG = {str(token): -100 for token in range(256, 263)}  # no token that ends an answer


def make(**options: Any) -> Llama:
    defaults = {"n_ctx": 4096, "n_threads": 1, "verbose": False}
    return Llama(pocket.model_path(), mmproj=pocket.mmproj_path(), **(defaults | options))


def album(n: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    content: list[dict[str, Any]] = []
    for i in range(n):
        picture = pocket.render_picture("red", "circle", "A", rng)
        content += [
            {"type": "text", "text": f"Picture {i + 1}:"},
            {"type": "image", "image": picture},
        ]
    return [*content, {"type": "text", "text": "\nWhat shape is in picture 1?"}]


def test_text_without_a_cap_is_as_without_merging() -> None:
    """Bit for bit: logits after a prompt, and a whole conversation."""
    chats = [[{"role": "user", "content": TEXT}], [{"role": "user", "content": TEXT + "Hello"}]]
    logits, answers = [], []
    for merge in (None, "auto"):
        with make(kv_merge=merge, kv_budget=0.05, logits_all=True) as llm:
            llm.create_completion(TEXT, max_tokens=4, temperature=0)
            logits.append(llm.scores[: llm.n_tokens].copy())
            answers.append(
                [
                    llm.create_chat_completion(chat, temperature=0, max_tokens=8)["choices"]
                    for chat in chats
                ]
            )
            assert llm.kv_stats().merges == ()
    assert np.array_equal(*logits)
    assert answers[0] == answers[1]


def test_text_beside_pictures_is_kept_whole() -> None:
    with make(kv_merge="auto", kv_budget=0.2, kv_trace=True) as llm:
        llm.create_chat_completion(
            [{"role": "user", "content": album(4)}], max_tokens=1, temperature=0
        )
        stats, engine = llm.kv_stats(), llm.engine
        assert engine is not None and len(stats.merges) == 1
        media = sum(span.end - span.start for span in llm.media_spans)
        text = stats.merges[0].tokens - media
        assert (stats.merges[0].text_before, stats.merges[0].text_after) == (text, text)
        assert stats.merges[0].cells_after == text + -(-media // 5)
        assert "all text" in str(stats)
        is_text = np.ones(stats.merges[0].tokens, bool)
        for span in llm.media_spans:
            is_text[span.start : span.end] = False
        for layer in range(engine.stats().n_layers):
            for head in range(engine.layer(layer).n_head_kv):
                target = np.asarray(engine.plan(layer, head).target)
                assert np.array_equal(target[is_text], np.flatnonzero(is_text))


def test_old_pictures_keep_what_they_had() -> None:
    """Later turns with more pictures do not wear the first ones away."""

    def held(engine: Engine) -> np.ndarray:
        """Cells of each picture in each layer, the mean over the heads, [layers, pictures]."""
        found = []
        for layer in range(engine.stats().n_layers):
            counts = []
            for head in range(engine.layer(layer).n_head_kv):
                plan = engine.plan(layer, head)
                media = (plan.modality > 0) & (plan.target == np.arange(len(plan.target)))
                segments = np.unique(plan.segment[plan.modality > 0])
                counts.append([int((media & (plan.segment == s)).sum()) for s in segments])
            found.append(np.mean(counts, axis=0))
        return np.array(found)

    with make(kv_merge="auto", kv_budget=0.2, kv_trace=True) as llm:
        messages: list[dict[str, Any]] = []
        engine = llm.engine
        assert engine is not None
        for turn in range(6):
            messages.append({"role": "user", "content": album(2, seed=turn)})
            said = llm.create_chat_completion(messages, max_tokens=8, temperature=0)
            messages.append(said["choices"][0]["message"])
            if turn == 0:
                first = held(engine)
        last = held(engine)
        assert last.shape == (len(first), 12)
        assert (last >= 1).all()
        assert last[:, :2].sum() >= 0.75 * first.sum()


def test_a_number_of_cells_is_for_pictures() -> None:
    with make(kv_merge="auto", kv_budget=40) as llm:
        llm.create_chat_completion([{"role": "user", "content": album(4)}], max_tokens=1)
        stats = llm.kv_stats()
        media = sum(span.end - span.start for span in llm.media_spans)
        assert stats.merges[0].cells_after == stats.merges[0].tokens - media + 40


def test_answers_what_the_full_cache_answers() -> None:
    """End to end, at a fifth: at least nine tenths of what the full cache has right."""
    right = {None: 0, "auto": 0}
    both = 0
    for seed in range(4):
        prompt = pocket.make_prompt(np.random.default_rng(100 + seed), 8)
        got: dict[str | None, list[bool]] = {}
        for merge in right:
            with make(kv_merge=merge, kv_budget=0.2, merge_before=8) as llm:
                got[merge] = [
                    llm.create_chat_completion(prompt.messages(i), temperature=0, max_tokens=96)[
                        "choices"
                    ][0]["message"]["content"]
                    == question.answer
                    for i, question in enumerate(prompt.questions)
                ]
        for merge, answers in got.items():
            right[merge] += sum(answers)
        both += sum(a and b for a, b in zip(got[None], got["auto"], strict=True))
    assert right[None] >= 20, "the full cache has too few right for this test to say anything"
    assert both >= 0.9 * right[None]


# of the methods that are Python, which copy the cache in every merge, one is enough
SLOW = {"none", "bacon", "flashcache", "tgv-kv"}


@pytest.mark.parametrize("name", sorted(set(presets()) - SLOW))
def test_a_cap_leaves_room_for_a_stretch_of_the_answer(name: str) -> None:
    """A prompt of several caps, and a long answer: at most one merge in 64 tokens."""
    with make(kv_merge=name, kv_max_cells=512, n_ctx=8192) as llm:
        content = [*album(24)[:-1], {"type": "text", "text": TEXT}]
        stream = llm.create_chat_completion(
            [{"role": "user", "content": content}], stream=True, max_tokens=200, logit_bias=LONG
        )
        next(stream)
        before = len(llm.kv_stats().merges)
        n_tokens = llm.n_tokens
        for _ in stream:
            pass
        stats = llm.kv_stats()
        read = llm.n_tokens - n_tokens
        assert read > 150
        assert len(stats.merges) - before <= read // 64 + 1
        assert max(stats.layer_cells) <= 512


def test_where_a_cap_makes_text_shrink_its_end_stays() -> None:
    with make(kv_merge="auto", kv_max_cells=512, kv_trace=True) as llm:
        llm.create_completion(TEXT * 8, max_tokens=1)
        stats, engine = llm.kv_stats(), llm.engine
        assert engine is not None and stats.merges
        assert any(merge.text_after < merge.text_before for merge in stats.merges)
        assert "merged or dropped" in str(stats)
        plan = engine.plan(0, 0)
        target = np.asarray(plan.target)
        kept = np.flatnonzero(target == np.arange(len(target)))
        assert set(range(4)) <= set(kept.tolist())
        last = len(target) - len(kept) // 2
        assert set(range(last + 1, len(target))) <= set(kept.tolist())
        assert ((target < 0) | (target == np.arange(len(target)))).all(), "words were averaged"


@pytest.mark.parametrize("budget", [1, 4, 20])
def test_cells_for_nothing_but_the_ends_are_refused(budget: int) -> None:
    with pytest.raises(BudgetError, match="Did you mean a fraction"):
        make(kv_merge="auto", kv_budget=budget)
