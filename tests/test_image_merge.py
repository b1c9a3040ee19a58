"""Tokens of a picture that are alike become one, against the definition written out in loops."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import kvmerge
from conftest import Factory, answer
from kvmerge import errors, pocket
from kvmerge.chat import handler as chat_module
from kvmerge.media.image_merge import DEFAULT_THRESHOLD, ImageMerge
from kvmerge.progress import ReadingProgress
from media_work import Work, large, logits, sound
from mrope_model import write_mrope_model
from projector_models import SLICE_TOKENS, write_audio_mmproj, write_sliced_mmproj
from test_prepared import chat, png

QUESTION = "What colour is in picture 1?"


def by_definition(rows: npt.NDArray[np.float32], threshold: float, floor: int) -> list[list[int]]:
    """Return the groups, the token whose place each takes first."""
    units = [row / (np.linalg.norm(row) or 1.0) for row in rows.astype(np.float64)]
    n = len(rows)
    cosine = [[float(a @ b) for b in units] for a in units]
    free, groups, left = set(range(n)), [], n
    while left > floor:
        best: list[int] = []
        for i in sorted(free):
            group = [i, *(j for j in sorted(free) if j != i and cosine[i][j] >= threshold)]
            if len(group) > max(len(best), 1):
                best = group
        if not best:
            break
        centre, *others = best
        others = sorted(others, key=lambda j: -cosine[centre][j])[: left - floor]
        groups.append([centre, *others])
        free -= set(groups[-1])
        left -= len(others)
    return sorted(groups + [[i] for i in free])


def pictures() -> list[npt.NDArray[np.float32]]:
    rng = np.random.default_rng(5)
    found = []
    for n, n_kinds, noise in (
        (1, 1, 0.0),
        (40, 5, 0.1),
        (64, 64, 0.5),
        (90, 8, 0.4),
        (50, 1, 0.02),
    ):
        kinds = rng.standard_normal((n_kinds, 24))
        rows = kinds[rng.integers(0, n_kinds, n)] + noise * rng.standard_normal((n, 24))
        found.append(rows.astype(np.float32))
    found.append(np.zeros((6, 24), np.float32))
    return found


@pytest.mark.parametrize("rows", pictures(), ids=lambda rows: str(len(rows)))
@pytest.mark.parametrize("threshold", [0.3, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("floor", [1, 4, 30])
def test_groups(rows: npt.NDArray[np.float32], threshold: float, floor: int) -> None:
    merged = ImageMerge(threshold, floor)(rows)
    groups = by_definition(rows, threshold, floor)
    assert merged.kept.tolist() == [group[0] for group in groups]
    assert merged.weights.tolist() == [len(group) for group in groups]
    assert merged.weights.sum() == len(rows)
    for place, group in enumerate(groups):
        assert set(np.flatnonzero(merged.group == place)) == set(group)
        mean = rows[group].astype(np.float64).mean(0)
        assert np.allclose(merged.embeddings[place], mean, atol=1e-6)
        if len(group) == 1:
            assert np.array_equal(merged.embeddings[place], rows[group[0]]), "left as it is"
    assert len(groups) >= min(floor, len(rows))


@pytest.mark.parametrize("value", [0, -0.5, 1.5, float("nan"), "yes", [0.9], b"1"])
def test_bad_thresholds(value: Any) -> None:
    with pytest.raises(errors.OptionError, match="image_merge="):
        kvmerge.Llama(pocket.model_path(), mmproj=pocket.mmproj_path(), image_merge=value)


def test_values() -> None:
    assert ImageMerge.of(None) is None and ImageMerge.of(False) is None
    assert ImageMerge.of(True) == ImageMerge(DEFAULT_THRESHOLD, 4)
    assert ImageMerge.of(0.7, 9) == ImageMerge(0.7, 9)
    with pytest.raises(errors.OptionError, match="image_merge= needs mmproj="):
        kvmerge.Llama(pocket.model_path(), image_merge=0.9)


def test_of_the_server_in_python() -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("sse_starlette")
    from kvmerge import llama_cpp_server

    files = {"model": str(pocket.model_path()), "mmproj": str(pocket.mmproj_path())}
    flags = {"image_merge": 0.8, "image_min_tokens": 9, "n_ctx": 512, "n_threads": 1}
    line = [f"--{name}={value}" for name, value in {**files, **flags, "verbose": "false"}.items()]
    (settings,) = llama_cpp_server._settings(line)[1]
    with llama_cpp_server._Models.load_llama_from_model_settings(settings) as llm:
        handler: Any = llm.chat_handler
        assert handler.image_merge == ImageMerge(0.8, 9)


# In chats.


@pytest.mark.parametrize("merge", [None, "auto"])
def test_fewer_tokens_are_read(merge: str | None, llama: Factory, work: Work) -> None:
    prompt = pocket.make_prompt(np.random.default_rng(20), 6)
    llm, plain = llama(image_merge=0.95, kv_merge=merge), llama()
    assert llm.count_tokens(prompt.messages(0)).image == 6 * 64, "the most it can be"
    right = [0.0, 0.0]
    for i, question in enumerate(prompt.questions[:5]):
        for k, one in enumerate((llm, plain)):
            said = answer(one, prompt.messages(i))
            right[k] += pocket.score(question.task, said, question.answer)
    assert right[0] >= right[1] - 1
    counts = llm.kv_stats().image_merge
    assert counts is not None
    assert counts.encoded % 64 == 0 and counts.read < counts.encoded / 4
    tokens = llm.count_tokens(prompt.messages(0))
    assert all(4 <= n < 64 for n in tokens.media)
    assert llm.n_tokens < plain.n_tokens - 200
    work.take()
    answer(llm, prompt.messages(0))
    assert work.take() == (0, 0)


def test_conversation_goes_on(llama: Factory, work: Work) -> None:
    llm = llama(image_merge=0.95, image_cache=None)
    messages = chat([png(0), png(1)], QUESTION)
    said = answer(llm, messages, max_tokens=4)
    work.take()
    more = [*messages, {"role": "assistant", "content": said}, *chat([png(2)], "And this?")]
    answer(llm, more, max_tokens=4)
    assert work.take() == (1, 1), "only the new picture"
    llm.reset()
    answer(llm, more, max_tokens=4)
    assert work.take() == (3, 3)
    with llm.context(chat([png(0), png(3)])) as context:
        work.take()
        for question in (QUESTION, "Which letter?"):
            context.ask(question, max_tokens=2)
        assert work.take() == (0, 0)


def test_nothing_alike_is_as_without(llama: Factory, tmp_path: Path) -> None:
    """Above every cosine all tokens are read, one by one, to the same logits."""
    options = {"mmproj": write_sliced_mmproj(tmp_path / "a.gguf"), "n_ctx": 4096}
    messages = chat([large(0), large(1)], QUESTION)
    found = logits(llama(**options, image_merge=1.0, image_min_tokens=4096), messages)
    assert np.array_equal(found, logits(llama(**options), messages))


def test_slices_are_merged_each(llama: Factory, tmp_path: Path) -> None:
    options = {"mmproj": write_sliced_mmproj(tmp_path / "a.gguf"), "n_ctx": 4096}
    llm, plain = llama(**options, image_merge=0.2), llama(**options)
    messages = chat([large(0), large(1)], QUESTION)
    for one in (llm, plain):
        answer(one, messages, max_tokens=1)
    assert len(llm.media_spans) == len(plain.media_spans)
    sizes = [span.end - span.start for span in llm.media_spans]
    assert min(sizes) >= 4 and max(sizes) <= SLICE_TOKENS and sum(sizes) < 0.8 * 16 * len(sizes)


def test_weights_reach_the_cells(llama: Factory) -> None:
    llm = llama(image_merge=0.95, kv_merge="auto", kv_budget=1.0, kv_max_cells=2048)
    answer(llm, chat([png(0), png(1)], QUESTION), max_tokens=1)
    assert llm.engine is not None
    mass = llm.engine.read_cells(0).mass[:, 0]
    for span in llm.media_spans:
        assert span.end - span.start < 64
        assert mass[span.start : span.end].sum() == 64
    plain = llama(image_merge=0.95)
    assert not np.allclose(
        logits(llm, chat([png(2)], QUESTION)), logits(plain, chat([png(2)], QUESTION)), atol=1e-3
    )


def test_rows_and_columns(llama: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With M-RoPE a token stays at its row and column, and the picture ends where it did."""
    model, mmproj = write_mrope_model(tmp_path)
    read = []
    decode = chat_module.decode_embeddings

    def noted(context: Any, embeddings: Any, positions: Any, *rest: Any) -> int:
        read.append(positions)
        return decode(context, embeddings, positions, *rest)

    monkeypatch.setattr(chat_module, "decode_embeddings", noted)
    llm, plain = llama(model, mmproj=mmproj, image_merge=0.1), llama(model, mmproj=mmproj)
    messages = chat([large(0, 64, 64), large(1, 64, 32)], QUESTION)
    for one in (llm, plain):
        answer(one, messages, max_tokens=1)
    assert len(read) == 2
    assert llm.kv_stats().positions == plain.kv_stats().positions
    assert llm.n_tokens < plain.n_tokens
    for span, whole, positions, ratio in zip(
        llm.media_spans, plain.media_spans, read, (1, 2), strict=True
    ):
        n = whole.end - whole.start
        columns = round((n * ratio) ** 0.5)
        rows, start = n // columns, int(positions[0, 0])
        assert positions.shape == (4, span.end - span.start)
        assert (positions[0] == start).all() and not positions[3].any()
        y, x = positions[1] - start, positions[2] - start
        assert y.min() >= 0 and y.max() < rows and x.min() >= 0 and x.max() < columns
        handler = llm.chat_handler
        merged = handler.image_merge(
            handler.image_cache._memory[_name_of(handler, span)].embeddings
        )
        assert np.array_equal(y * columns + x, merged.kept)
        assert start == llm.kv_cache.position(span.start)
        assert llm.kv_cache.position(span.end) == start + max(rows, columns)


def _name_of(handler: Any, span: Any) -> tuple[str, int]:
    """Return under which name a picture is kept that lies somewhere in the cache."""
    names = list(handler.image_cache._memory)
    return next(name for name in names if handler.digest_of_slice(name[0], name[1]) == span.digest)


def test_rows_and_columns_by_definition(llama: Factory, tmp_path: Path) -> None:
    model, mmproj = write_mrope_model(tmp_path)
    messages = chat([large(0, 64, 64)], QUESTION)
    whole = llama(model, mmproj=mmproj, image_merge=1.0, image_min_tokens=16)
    assert np.array_equal(logits(whole, messages), logits(llama(model, mmproj=mmproj), messages))


# What is left alone.


def test_sound_is_left_alone(llama: Factory, tmp_path: Path) -> None:
    mmproj = write_audio_mmproj(tmp_path / "a.gguf")
    messages = [{"role": "user", "content": [{"type": "audio", "audio": sound(2)}, "What?"]}]
    found = logits(llama(mmproj=mmproj, n_ctx=2048, image_merge=0.1), messages)
    assert np.array_equal(found, logits(llama(mmproj=mmproj, n_ctx=2048), messages))


def test_unknown_and_non_causal_models_are_left_alone(
    llama: Factory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from gemma_model import write_gemma_mmproj

    write_gemma_mmproj(tmp_path / "a.gguf", 64)
    with caplog.at_level(logging.WARNING, "kvmerge"):
        llm = llama(mmproj=tmp_path / "a.gguf", image_merge=0.1)
    assert "image_merge= is left aside" in caplog.text and "both directions" in caplog.text
    messages = chat([png(0)], QUESTION)
    found = logits(llm, messages)
    assert np.array_equal(found, logits(llama(mmproj=tmp_path / "a.gguf"), messages))
    assert "which tokens of the projector 'pixtral'" in str(
        chat_module.reason_to_read_whole("pixtral", False)
    )


def test_progress_and_stop(llama: Factory, work: Work) -> None:
    seen: list[ReadingProgress] = []

    def stop(state: ReadingProgress) -> bool:
        seen.append(state)
        return state.media < 3

    llm = llama(image_merge=0.95, progress=stop)
    messages = chat([png(i) for i in range(4)], QUESTION)
    with pytest.raises(errors.StoppedError):
        answer(llm, messages)
    assert work.take()[1] == 2 and seen[-1].n_media == 4
    with pytest.raises(errors.StoppedError):
        answer(llm, messages)
    assert work.take()[1] == 2, "those that were encoded are found"
    assert len(llm.media_spans) == 2, "and those that were read are kept"
    answer(llm, messages)
    assert work.take()[1] == 0
