"""Only what is new is prepared: pictures in the cache are neither read, decoded nor encoded."""

from __future__ import annotations

import http.server
import io
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvmerge
from conftest import Factory, answer
from kvmerge import errors, pocket
from kvmerge.chat.bitmaps import Bitmaps
from kvmerge.chat.handler import ChatHandler
from kvmerge.media import MediaPart
from kvmerge.media.access import MediaAccess

N = 8


def png(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    colours = list(pocket.COLOURS)
    buffer = io.BytesIO()
    pocket.render_picture(colours[seed % len(colours)], "circle", "A", rng).save(buffer, "PNG")
    return buffer.getvalue()


class Counted:
    """How often pictures were decoded, encoded, read from files, and fetched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.decoded = self.encoded = self.files = self.fetched = 0
        for owner, name, field in (
            (Bitmaps, "of", "decoded"),
            (ChatHandler, "decode_chunk", "encoded"),  # which encodes what is not kept
            (MediaAccess, "read", "files"),
            (MediaAccess, "fetch", "fetched"),
        ):
            monkeypatch.setattr(owner, name, self._counting(getattr(owner, name), field))

    def _counting(self, function: Any, field: str) -> Any:
        def counting(*arguments: Any) -> Any:
            setattr(self, field, getattr(self, field) + 1)
            return function(*arguments)

        return counting

    def take(self) -> dict[str, int]:
        """Return the counts since the last call."""
        counts = dict(vars(self))
        for name in counts:
            setattr(self, name, 0)
        return counts


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, bytes]]]:
    files: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path in files else 404)
            self.end_headers()
            self.wfile.write(files.get(self.path, b""))

        def log_message(self, *_: Any) -> None:
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", files
    httpd.shutdown()
    httpd.server_close()


def chat(sources: list[Any], *turns: str) -> list[dict[str, Any]]:
    content: list[Any] = []
    for number, source in enumerate(sources, 1):
        content += [f"Picture {number}:", {"type": "image", "image": source}, "\n"]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    for i, turn in enumerate(turns):
        messages.append({"role": "user" if i % 2 == 0 else "assistant", "content": turn})
    return messages


NEW = {"decoded": N, "encoded": N, "files": 0, "fetched": 0}
NOTHING = dict.fromkeys(NEW, 0)
QUESTIONS = ("What colour is in picture 1?", "red", "And in picture 2?", "blue", "And 3?")


@pytest.mark.parametrize("merge", [None, "auto"])
@pytest.mark.parametrize("form", ["bytes", "path", "URL", "Pillow"])
def test_three_turns(
    form: str,
    merge: str | None,
    llama: Factory,
    counted: Counted,
    server: tuple[str, dict[str, bytes]],
    tmp_path: Path,
) -> None:
    from PIL import Image

    url, files = server
    sources: list[Any] = []
    for i in range(N):
        data = png(i)
        (tmp_path / f"{i}.png").write_bytes(data)
        files[f"/{i}.png"] = data
        sources.append(
            {
                "bytes": data,
                "path": str(tmp_path / f"{i}.png"),
                "URL": f"{url}/{i}.png",
                "Pillow": Image.open(io.BytesIO(data)),
            }[form]
        )
    llm = llama(kv_merge=merge)
    first = NEW | {"files": N * (form == "path"), "fetched": N * (form == "URL")}
    for turn, expected in ((1, first), (3, NOTHING), (5, NOTHING)):
        answer(llm, chat(sources, *QUESTIONS[:turn]), max_tokens=4)
        assert counted.take() == expected
    assert len(llm.media_spans) == N


@pytest.mark.parametrize("merge", [None, "auto"])
def test_new_picture_only(merge: str | None, llama: Factory, counted: Counted) -> None:
    llm = llama(kv_merge=merge)
    sources = [png(i) for i in range(N)]
    answer(llm, chat(sources, QUESTIONS[0]), max_tokens=1)
    counted.take()
    messages = [*chat(sources, QUESTIONS[0]), *chat([png(100)], "And this?")]
    answer(llm, messages, max_tokens=1)
    assert counted.take() == NOTHING | {"decoded": 1, "encoded": 1}


def test_same_tokens_as_prepared_whole(llama: Factory) -> None:
    """Pictures that are given as nothing but their size leave every token as it was."""
    llm, other = llama(), llama()
    sources = [png(i) for i in range(4)]
    for turn in (1, 3, 5):
        messages = chat(sources, *QUESTIONS[:turn])
        other.reset()
        assert answer(llm, messages) == answer(other, messages)
        n = llm.n_tokens
        assert llm.input_ids[:n].tolist() == other.input_ids[:n].tolist()


@pytest.mark.parametrize("merge", [None, "auto"])
def test_read_again_after_all(merge: str | None, llama: Factory, counted: Counted) -> None:
    """Text before the pictures changes: they are in the cache, and have to be read again."""
    llm = llama(kv_merge=merge, image_cache=None)
    sources = [png(i) for i in range(4)]
    answer(llm, chat(sources, QUESTIONS[0]), max_tokens=1)
    counted.take()
    messages = [{"role": "system", "content": "Look."}, *chat(sources, QUESTIONS[0])]
    said = answer(llm, messages)
    assert counted.take() == NOTHING | {"decoded": 4, "encoded": 4}
    assert said == answer(llama(kv_merge=merge), messages)


def test_cut_in_the_middle(llama: Factory, counted: Counted) -> None:
    llm = llama(image_cache=None)
    sources = [png(i) for i in range(4)]
    answer(llm, chat(sources, QUESTIONS[0]), max_tokens=1)
    counted.take()
    messages = chat(sources, QUESTIONS[0])
    messages[0]["content"][6] = "Now picture 3:"
    said = answer(llm, messages)
    assert counted.take() == NOTHING | {"decoded": 2, "encoded": 2}
    assert said == answer(llama(), messages)


def test_pictures_that_changed_places(llama: Factory, counted: Counted) -> None:
    llm = llama()
    sources = [png(i) for i in range(4)]
    answer(llm, chat(sources, QUESTIONS[0]), max_tokens=1)
    counted.take()
    messages = chat([sources[0], sources[2], sources[1], sources[3]], QUESTIONS[0])
    said = answer(llm, messages)
    assert counted.take()["encoded"] == 3
    assert said == answer(llama(), messages)


def test_after_reset(llama: Factory, counted: Counted) -> None:
    llm = llama(image_cache=None)
    messages = chat([png(1)], QUESTIONS[0])
    first = answer(llm, messages)
    llm.reset()
    counted.take()
    assert answer(llm, messages) == first
    assert counted.take() == NOTHING | {"decoded": 1, "encoded": 1}


def test_file_that_changed(llama: Factory, counted: Counted, tmp_path: Path) -> None:
    llm, file = llama(), tmp_path / "a.png"
    file.write_bytes(png(1))
    messages = chat([str(file)], QUESTIONS[0])
    answer(llm, messages, max_tokens=1)
    [before] = llm.media_spans
    os.utime(file, ns=(1, 1))
    counted.take()
    answer(llm, messages, max_tokens=1)
    assert counted.take() == NOTHING | {"files": 1}, "the same bytes at another time"
    file.write_bytes(png(2))
    answer(llm, messages, max_tokens=1)
    assert counted.take() == NOTHING | {"files": 1, "decoded": 1, "encoded": 1}
    assert llm.media_spans != (before,)
    file.unlink()
    with pytest.raises(errors.MediaError, match="does not exist"):
        answer(llm, messages, max_tokens=1)


@pytest.mark.parametrize("merge", [None, "auto"])
def test_url_that_changed(
    merge: str | None, llama: Factory, counted: Counted, server: tuple[str, dict[str, bytes]]
) -> None:
    """It is not asked for again while it is in the cache, and is what it is now when it is."""
    url, files = server
    llm = llama(kv_merge=merge, image_cache=None)
    files["/a.png"] = png(1)
    messages = chat([f"{url}/a.png"], QUESTIONS[0])
    answer(llm, messages, max_tokens=1)
    [before] = llm.media_spans
    files["/a.png"] = png(2)
    answer(llm, messages, max_tokens=1)
    assert llm.media_spans == (before,)
    counted.take()
    messages = [{"role": "system", "content": "Look."}, *messages]
    said = answer(llm, messages)
    assert counted.fetched in (1, 2)
    assert llm.media_spans[0].digest != before.digest
    assert said == answer(llama(kv_merge=merge), messages)
    llm.reset()
    del files["/a.png"]
    with pytest.raises(errors.MediaError, match="HTTP 404"):
        answer(llm, messages)


def test_access_is_asked_for_known_files_too(llama: Factory, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    file = tmp_path / "in" / "a.png"
    file.write_bytes(png(1))
    llm = llama(media_access=MediaAccess(folders=[tmp_path / "in"]))
    messages = chat([str(file)], QUESTIONS[0])
    answer(llm, messages, max_tokens=1)
    file.rename(tmp_path / "a.png")
    file.symlink_to(tmp_path / "a.png")
    with pytest.raises(errors.MediaError, match="outside the folders"):
        answer(llm, messages, max_tokens=1)


def test_context(llama: Factory, counted: Counted) -> None:
    llm = llama(kv_merge="auto")
    with llm.context(chat([png(i) for i in range(4)])) as context:
        assert counted.take() == NOTHING | {"decoded": 4, "encoded": 4}
        for question in QUESTIONS:
            context.ask(question, max_tokens=1)
        assert counted.take() == NOTHING


def test_saved_context_encodes_nothing(llama: Factory, counted: Counted, tmp_path: Path) -> None:
    messages = chat([png(i) for i in range(3)], QUESTIONS[0])
    first: kvmerge.Llama = llama(kv_merge="auto")
    said = answer(first, messages)
    first.save_context(tmp_path / "a.kvm")
    counted.take()
    second = llama(kv_merge="auto")
    second.load_context(tmp_path / "a.kvm")
    more = [*messages, {"role": "assistant", "content": said}, {"role": "user", "content": "And?"}]
    answer(second, more)
    assert counted.take()["encoded"] == 0
    answer(second, more)
    assert counted.take() == NOTHING


def test_digest_is_not_read_from_a_part_twice() -> None:
    part = MediaPart(1, "image", io.BytesIO(png(1)))
    assert part.content is part.content
