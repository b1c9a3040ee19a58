"""What was encoded once is neither decoded nor encoded again: here, later, in other processes."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import kvmerge
from conftest import Factory, answer
from kvmerge import errors, pocket
from kvmerge.chat.handler import ChatHandler
from kvmerge.media.image_cache import SUFFIX, Encoded, ImageCache
from media_work import Work, large, logits, sound
from mrope_model import write_mrope_model
from projector_models import SLICE_TOKENS, SOUND_TOKENS, write_audio_mmproj, write_sliced_mmproj
from test_prepared import chat, png

QUESTION = "What colour is in picture 1?"


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(png(seed))).convert("RGB").save(file, "JPEG")
    return file.getvalue()


# In one process.


@pytest.mark.parametrize("merge", [None, "auto"])
def test_another_chat_and_one_that_is_cut(merge: str | None, llama: Factory, work: Work) -> None:
    llm, plain = llama(kv_merge=merge), llama(kv_merge=merge, image_cache=None)
    sources = [png(0), jpeg(1), png(2), jpeg(3)]
    answer(llm, chat(sources, QUESTION), max_tokens=1)
    assert work.take() == (4, 4)
    cut = chat(sources, QUESTION)
    cut[0]["content"][3] = "Picture two:"
    for messages in (
        cut,
        chat(sources[:2], QUESTION),
        [{"role": "system", "content": "Look."}, *chat(sources[::-1], QUESTION)],
    ):
        found = logits(llm, messages)
        assert work.take() == (0, 0)
        assert np.array_equal(found, logits(plain, messages))
        work.take()
    stats = llm.kv_stats().image_cache
    assert stats is not None and (stats.encoded, stats.held) == (4, 4)
    # A merged cache is read again from its beginning.
    assert stats.found == (3 + 1 + 4 if merge is None else 4 + 2 + 4)


def test_context_finds_them(llama: Factory, work: Work) -> None:
    llm = llama()
    messages = chat([png(0), png(1)])
    answer(llm, chat([png(1), png(0)], QUESTION), max_tokens=1)
    work.take()
    with llm.context(messages) as context:
        context.ask(QUESTION, max_tokens=1)
    assert work.take() == (0, 0)


def test_off(llama: Factory, work: Work) -> None:
    for off in (None, 0):
        llm = llama(image_cache=off)
        for _ in range(2):
            answer(llm, chat([png(0)], QUESTION), max_tokens=1)
            llm.reset()
        assert work.take() == (2, 2)
        stats = llm.kv_stats().image_cache
        assert stats is not None and (stats.found, stats.held) == (0, 0)


def test_least_recently_used_goes_first(llama: Factory, work: Work) -> None:
    one = 64 * 128 * 4
    llm = llama()
    answer(llm, chat([png(0)], QUESTION), max_tokens=1)
    stats = llm.kv_stats().image_cache
    assert stats is not None
    one = round(stats.mib * 1024 * 1024)
    llm = llama(image_cache=2 * one + 100)
    for seed in (0, 1, 0, 2):  # 1 goes for 2
        answer(llm, chat([png(seed)], QUESTION), max_tokens=1)
    work.take()
    for seed, expected in ((0, (0, 0)), (2, (0, 0)), (1, (1, 1)), (0, (1, 1))):
        answer(llm, chat([png(seed)], QUESTION), max_tokens=1)
        assert work.take() == expected
    stats = llm.kv_stats().image_cache
    assert stats is not None and stats.mib * 1024 * 1024 <= 2 * one + 100


def test_more_pictures_than_have_room(llama: Factory, work: Work) -> None:
    """Those that have room are found, instead of each pushing out the next."""
    llm = llama()
    answer(llm, chat([png(0)], QUESTION), max_tokens=1)
    stats = llm.kv_stats().image_cache
    assert stats is not None
    llm = llama(image_cache=round(stats.mib * 1024 * 1024) * 3)
    sources = [png(seed) for seed in range(5)]
    messages = chat(sources, QUESTION)
    first = logits(llm, messages)
    llm.reset()
    work.take()
    assert np.array_equal(logits(llm, messages), first)
    assert work.take() == (2, 2)


def test_same_bytes_as_another_kind(llama: Factory, work: Work) -> None:
    llm = llama()
    answer(llm, chat([png(0)], QUESTION), max_tokens=1)
    messages = [{"role": "user", "content": [{"type": "audio", "audio": png(0)}, "What?"]}]
    with pytest.raises(errors.UnsupportedError, match="sound 1.*does not take sounds"):
        answer(llm, messages)


# Models that cut pictures, count positions otherwise, or hear.


def test_slices(llama: Factory, work: Work, tmp_path: Path) -> None:
    options = {"mmproj": write_sliced_mmproj(tmp_path / "a.gguf"), "n_ctx": 4096}
    llm, plain = llama(**options), llama(**options, image_cache=None)
    messages = chat([large(0), large(1, 64, 64), large(0)], QUESTION)
    found = logits(llm, messages)
    n = len(llm.media_spans)
    assert all(span.end - span.start == SLICE_TOKENS for span in llm.media_spans)
    stats = llm.kv_stats().image_cache
    assert stats is not None and n > 9
    assert stats.found > 1, "the first picture again"
    assert stats.found + stats.encoded == n
    work.take()
    llm.reset()
    assert np.array_equal(logits(llm, messages), found)
    assert work.take() == (0, 0)
    assert np.array_equal(logits(plain, messages), found)
    # Some slices of a picture are gone.
    for name in list(llm.chat_handler.image_cache._memory)[2::2]:
        llm.chat_handler.image_cache._drop(name)
    llm.reset()
    work.take()
    assert np.array_equal(logits(llm, messages), found)
    assert work.encoded == (stats.encoded - 1) // 2


def test_equal_slices_are_encoded_once(llama: Factory, work: Work, tmp_path: Path) -> None:
    """Empty paper, beside slices that have something on them, which are not taken for it."""
    llm = llama(mmproj=write_sliced_mmproj(tmp_path / "a.gguf"), n_ctx=4096, image_cache=None)
    paper = Image.new("RGB", (96, 64), "white")
    paper.paste((200, 0, 0), (40, 40, 50, 50))
    messages = chat([paper], QUESTION)
    found = logits(llm, messages)
    n = len(llm.media_spans)
    assert n == 7, "six slices and a thumbnail"
    assert work.take() == (1, 3), "white, the one with a mark, and the thumbnail"
    llm.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(llm.chat_handler._equal_slices), "encoded", lambda _, __, ___, each: each()
        )
        assert np.array_equal(logits(llm, messages), found), "as when each is encoded"
    assert work.take()[1] == n


def test_sound(llama: Factory, work: Work, tmp_path: Path) -> None:
    mmproj = write_audio_mmproj(tmp_path / "a.gguf")
    llm, plain = (llama(mmproj=mmproj, n_ctx=2048, image_cache=size) for size in (10**8, None))
    messages = [{"role": "user", "content": [{"type": "audio", "audio": sound(33)}, "What?"]}]
    found = logits(llm, messages)
    assert [span.end - span.start for span in llm.media_spans] == [SOUND_TOKENS] * 2
    work.take()
    llm.reset()
    assert np.array_equal(logits(llm, messages), found)
    assert work.take() == (0, 0)
    assert np.array_equal(logits(plain, messages), found)


def test_positions_in_rows_and_columns(llama: Factory, work: Work, tmp_path: Path) -> None:
    model, mmproj = write_mrope_model(tmp_path)
    folder = tmp_path / "cache"
    llm = llama(model, mmproj=mmproj, image_cache_dir=folder)
    messages = chat([large(0, 64, 64), large(1, 64, 32)], QUESTION)
    found, tokens = logits(llm, messages), llm.kv_stats().positions
    other = llama(model, mmproj=mmproj, image_cache_dir=folder)
    work.take()
    assert np.array_equal(logits(other, messages), found)
    assert other.kv_stats().positions == tokens
    assert work.take() == (0, 0)
    fewer = llama(model, mmproj=mmproj, image_cache_dir=folder, image_max_tokens=8)
    logits(fewer, messages)
    assert work.take() == (2, 2), "other settings are other embeddings"


# In a folder.


def test_folder_is_found_by_another_process(llama: Factory, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "cache"
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "1.jpg").write_bytes(jpeg(1))
    sources = [str(tmp_path / "0.png"), str(tmp_path / "1.jpg")]
    messages = chat(sources, QUESTION)
    first = llama(image_cache_dir=folder)
    expected = logits(first, messages)
    assert len(list(folder.iterdir())) == 2
    program = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import kvmerge
import pytest
from conftest import make_llama
from media_work import Work, logits
work = Work(pytest.MonkeyPatch())
llm = make_llama(image_cache_dir={str(folder)!r})
values = logits(llm, {messages!r})
stats = llm.kv_stats().image_cache
print(json.dumps([work.take(), stats.found_in_folder, values.tobytes().hex()]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    counts, found, values = json.loads(done.stdout.splitlines()[-1])
    assert counts == [0, 0]
    assert found == 2
    assert values == expected.tobytes().hex()


def test_folder_without_memory_and_after_load_context(
    llama: Factory, work: Work, tmp_path: Path
) -> None:
    folder, messages = tmp_path / "cache", chat([png(0), png(1)], QUESTION)
    first = llama(kv_merge="auto", image_cache=None, image_cache_dir=folder)
    said = answer(first, messages)
    first.save_context(tmp_path / "a.kvm")
    work.take()
    second = llama(kv_merge="auto", image_cache=None, image_cache_dir=folder)
    second.load_context(tmp_path / "a.kvm")
    more = [*messages, {"role": "assistant", "content": said}, *chat([png(1)], "And this?")]
    answer(second, more)
    assert work.take() == (0, 0)
    stats = second.kv_stats().image_cache
    assert stats is not None and (stats.held, stats.found_in_folder) == (0, 1)


def damage(data: bytes, how: str) -> bytes:
    half = len(data) // 2
    return {
        "empty": b"",
        "short": data[:20],
        "cut off": data[:half],
        "longer": data + b"x",
        "a bit": data[:half] + bytes([data[half] ^ 4]) + data[half + 1 :],
        "header": data[:20] + bytes([data[20] ^ 4]) + data[21:],
        "checksum": data[:-1] + bytes([data[-1] ^ 1]),
        "another version": data[:8] + b"\x09" + data[9:],
        "something else": b"PNG" * 1000,
    }[how]


@pytest.mark.parametrize(
    "how",
    ["empty", "short", "cut off", "longer", "a bit", "header", "checksum", "another version"]
    + ["something else"],
)
def test_damaged_file(
    how: str, llama: Factory, work: Work, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    messages = chat([png(0), png(1)], QUESTION)
    expected = logits(llama(image_cache_dir=tmp_path), messages)
    files = sorted(tmp_path.glob("*" + SUFFIX))
    whole = files[0].read_bytes()
    files[0].write_bytes(damage(whole, how))
    work.take()
    llm = llama(image_cache_dir=tmp_path)
    with caplog.at_level(logging.WARNING, "kvmerge"):
        assert np.array_equal(logits(llm, messages), expected)
    assert work.take() == (1, 1)
    stats = llm.kv_stats().image_cache
    assert stats is not None and stats.damaged >= 1
    assert "is not used, the picture is encoded anew" in caplog.text
    assert files[0].read_bytes() == whole, "it is written again"


def test_header_of_anybody(tmp_path: Path) -> None:
    """A checksum can be made by anybody: what a header says is checked as well."""
    import hashlib
    import struct

    cache = ImageCache(None, tmp_path)
    values = np.zeros((2, 3), "<f4").tobytes()
    for header in (
        b"[]",
        b"{",
        b"[" * 60000,
        b'{"modality": "image", "size": [1, 2], "shape": [2, 4]}',
        b'{"modality": "image", "size": [1, 2], "shape": [-2, -3]}',
        b'{"modality": "image", "size": [1, 2], "shape": [2.0, 3]}',
        b'{"modality": "film", "size": [1, 2], "shape": [2, 3]}',
        b'{"modality": "image", "size": [0, 2], "shape": [2, 3]}',
        b'{"modality": "image", "size": 5, "shape": [2, 3]}',
    ):
        data = struct.pack("<8sII", b"kvimage\0", 1, len(header)) + header + values
        cache._file(("ab", 0)).write_bytes(data + hashlib.sha256(data).digest())
        assert cache.peek("ab", "image") is None
    assert cache.stats().damaged == 9
    cache.put(("ab", 0), Encoded("image", (1, 2), np.ones((2, 3), np.float32)))
    assert cache.peek("ab", "image") is not None
    assert cache.peek("ab", "audio") is None


def test_many_writers_leave_whole_files(tmp_path: Path) -> None:
    n_damaged, stop = [0], threading.Event()
    embeddings = np.random.default_rng(0).normal(size=(256, 512)).astype(np.float32)

    def write() -> None:
        cache = ImageCache(None, tmp_path)
        for _ in range(30):
            cache.put(("ab", 0), Encoded("image", (3, 4), embeddings.copy()))

    def read() -> None:
        cache, found = ImageCache(None, tmp_path), None
        while not stop.is_set():
            found = cache.get(("ab", 0), 256)
            assert found is None or np.array_equal(found, embeddings)
        assert found is not None
        n_damaged[0] += cache.stats().damaged

    writers = [threading.Thread(target=write) for _ in range(3)]
    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in writers + readers:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert n_damaged == [0]
    assert len(list(tmp_path.iterdir())) == 1


def test_folder_that_cannot_be_written(
    llama: Factory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cache"
    llm = llama(image_cache_dir=folder)
    folder.rmdir()
    with caplog.at_level(logging.WARNING, "kvmerge"):
        said = answer(llm, chat([png(0), png(1)], QUESTION))
    assert said == answer(llama(), chat([png(0), png(1)], QUESTION))
    assert caplog.text.count("encoded pictures are no longer written") == 1


@pytest.mark.parametrize("value", [True, -1, 1.5, "", "many", "1XiB", b"1", [1], {}, 10**30 * 1.0])
def test_bad_sizes(value: Any) -> None:
    with pytest.raises(errors.OptionError, match=r'image_cache.*"256MiB".*or None'):
        kvmerge.Llama(pocket.model_path(), mmproj=pocket.mmproj_path(), image_cache=value)
    with pytest.raises(errors.OptionError, match=r'image_cache.*"256MiB".*or None'):
        kvmerge.Llama(pocket.model_path(), image_cache=value)


def test_bad_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for value in (True, 1, "", b"x", tmp_path / "file", tmp_path / "file" / "in", "a\0b"):
        with pytest.raises(errors.OptionError, match="image_cache_dir"):
            ChatHandler(pocket.mmproj_path(), None, None, ImageCache("1MiB", value))
    with pytest.raises(errors.OptionError, match="image_cache_dir= needs mmproj="):
        kvmerge.Llama(pocket.model_path(), image_cache_dir=tmp_path)
