"""Known before the waiting: how long a prompt is, how far its reading is, and a stop on the way."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import kvmerge
from conftest import Factory, answer
from kvmerge import errors, pocket
from kvmerge.progress import Bar, ReadingProgress
from media_work import Work, large, logits, sound
from projector_models import SLICE_TOKENS, write_audio_mmproj, write_sliced_mmproj
from test_prepared import chat, png

QUESTION = "What colour is in picture 1?"


# How long a prompt is.


def turned(width: int, height: int) -> bytes:
    """Return a picture that is as wide as it says, but for its orientation."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (width, height), "red").save(file, "JPEG", exif=exif)
    return file.getvalue()


def test_tokens_are_those_that_are_read(
    llama: Factory,
    work: Work,
    tmp_path: Path,
) -> None:
    llm = llama(mmproj=write_sliced_mmproj(tmp_path / "a.gguf"), n_ctx=4096)
    messages = chat([large(0), turned(96, 32), large(1, 20, 20)], QUESTION)
    counted = llm.count_tokens(messages)
    assert work.take() == (0, 0)
    assert llm.n_tokens == 0
    usage = llm.create_chat_completion(messages, max_tokens=1)["usage"]
    assert counted.total == usage["prompt_tokens"]
    assert counted.image == usage["prompt_tokens_details"]["image_tokens"]
    assert counted.text == counted.total - counted.image
    spans = llm.media_spans
    assert counted.media == tuple(span.end - span.start for span in spans)
    assert set(counted.media) == {SLICE_TOKENS}
    assert counted.cached == 0
    first = len(llm.count_tokens(chat([large(0)], QUESTION)).media)
    again = llm.count_tokens(chat([large(0), turned(32, 96)], QUESTION))
    assert again.cached == spans[first].start, "up to the second picture"
    same = llm.count_tokens(messages)
    assert same.cached == same.total


def test_tokens_of_sound_and_of_text(llama: Factory, tmp_path: Path) -> None:
    llm = llama(mmproj=write_audio_mmproj(tmp_path / "a.gguf"), n_ctx=2048)
    messages = [{"role": "user", "content": [{"type": "audio", "audio": sound(33)}, "What?"]}]
    counted = llm.count_tokens(messages)
    usage = llm.create_chat_completion(messages, max_tokens=1)["usage"]
    assert (counted.total, counted.audio, counted.image) == (usage["prompt_tokens"], 1500, 0)
    plain = llama(mmproj=None, chat_format="chatml")
    messages = [{"role": "user", "content": "How long is this?"}]
    counted = plain.count_tokens(messages)
    usage = plain.create_chat_completion(messages, max_tokens=1)["usage"]
    assert counted.total == counted.text == usage["prompt_tokens"]


def test_tokens_of_a_file_that_is_none(llama: Factory) -> None:
    llm = llama()
    for data in (b"no picture at all", png(1)[:200]):
        with pytest.raises(errors.MediaError, match="picture 1"):
            llm.count_tokens(chat([data], QUESTION))


# How far reading is.


def test_what_is_reported(llama: Factory) -> None:
    seen: list[ReadingProgress] = []
    llm = llama(progress=seen.append, n_batch=32)
    sources = [png(0), png(1), png(0)]
    llm.create_chat_completion(chat(sources, QUESTION), max_tokens=4)
    n = llm.count_tokens(chat(sources, QUESTION)).total
    assert (seen[0].tokens, seen[0].media) == (0, 0)
    assert all((state.n_tokens, state.n_media) == (n, 3) for state in seen)
    assert seen[-1].tokens == n and seen[-1].media == 3 and not seen[-1].encoding
    for before, after in zip(seen, seen[1:], strict=False):
        assert 0 <= after.tokens - before.tokens <= 32
        assert 0 <= after.media - before.media <= 1
        assert after.seconds >= before.seconds
    assert [state.media for state in seen if state.encoding] == [1, 2, 3]
    assert seen[-1].seconds_left == pytest.approx(0, abs=1e-6)
    assert 0 < seen[len(seen) // 2].tokens_per_second < 1e9
    seen.clear()
    more = [*chat(sources, QUESTION), {"role": "assistant", "content": "red"}, *chat([png(2)], "?")]
    llm.create_chat_completion(more, max_tokens=1)
    assert seen[0].n_media == 1, "only what is new is read"
    assert seen[0].n_tokens < n


def test_slices_are_one_picture(llama: Factory, tmp_path: Path) -> None:
    seen: list[ReadingProgress] = []
    options = {"mmproj": write_sliced_mmproj(tmp_path / "a.gguf"), "n_ctx": 4096}
    llm = llama(**options, progress=seen.append)
    llm.create_chat_completion(chat([large(0), large(1)], QUESTION), max_tokens=1)
    assert len(llm.media_spans) > 4
    assert {state.n_media for state in seen} == {2}
    assert max(state.media for state in seen) == 2


@pytest.mark.parametrize("merge", [None, "auto"])
@pytest.mark.parametrize("share", [0.1, 0.45, 0.5, 0.9])
def test_stop(share: float, merge: str | None, llama: Factory, work: Work) -> None:
    """What was read is kept: the same chat goes on from there, and answers as if never stopped."""
    sources, read = [png(i) for i in range(4)], 0

    def stop(state: ReadingProgress) -> bool | None:
        nonlocal read
        read = state.tokens
        return False if state.tokens >= share * state.n_tokens else None

    llm = llama(progress=stop, n_batch=48, kv_merge=merge)
    messages = chat(sources, QUESTION)
    with pytest.raises(errors.StoppedError, match="the same chat goes on from there"):
        answer(llm, messages)
    encoded = work.take()[1]
    kept = llm.kv_stats().tokens
    n = llm.count_tokens(messages)
    assert read - 64 <= kept <= read < n.total, "all but a picture that was read in part"
    assert n.cached == kept
    share, read = 2.0, 0
    found = logits(llm, messages)
    assert work.take()[1] == 4 - encoded
    assert np.allclose(found, logits(llama(kv_merge=merge, n_batch=48), messages), atol=2e-2)


def test_error_of_the_callback(llama: Factory) -> None:
    def fail(state: ReadingProgress) -> None:
        if state.media == 2 and not state.encoding and state.tokens > 100:
            raise KeyError("mine")

    llm = llama(progress=fail, n_batch=24)
    with pytest.raises(KeyError, match="mine"):
        answer(llm, chat([png(0), png(1)], QUESTION))
    assert isinstance(answer(llm, [{"role": "user", "content": "Hello"}]), str)


@pytest.mark.parametrize("value", [1, "yes", [], 0.5])
def test_bad_progress(value: Any) -> None:
    with pytest.raises(errors.OptionError, match="progress="):
        kvmerge.Llama(pocket.model_path(), progress=value)


def test_bar() -> None:
    stream = io.StringIO()
    bar = Bar(stream)
    state = ReadingProgress(0, 1000, 0, 12)
    bar(state)
    bar(ReadingProgress(100, 1000, 3, 12, True, 0.5, 4.5))
    assert not stream.getvalue(), "nothing is shown of what is quick"
    bar(ReadingProgress(500, 1000, 3, 12, False, 70.0, 70.4))
    line = stream.getvalue()
    assert "[############            ]" in line
    assert "reading picture 3 of 12, 500 of 1000 tokens, 7 tokens/s, 1 min 10 s left" in line
    bar(ReadingProgress(510, 1000, 4, 12, True, 70.01, 70.4))
    assert stream.getvalue() == line, "not as often as that"
    bar(ReadingProgress(510, 1000, 4, 12, True, 71.0, 69.0))
    assert "encoding picture 4 of 12" in stream.getvalue()
    bar(ReadingProgress(1000, 1000, 12, 12, False, 140.0, 0.0))
    assert stream.getvalue().split("\r")[-2].strip() == "", "the line goes"
    stream.close()
    bar(ReadingProgress(1, 1000, 1, 12, False, 200.0, 1.0))  # nobody is there
