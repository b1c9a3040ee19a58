"""Which pictures `kvmerge serve` fetches that a message names by URL, and how much of them."""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from kvmerge import pocket
from serving import Answer, Server, is_built, refusal, serving

pytestmark = pytest.mark.skipif(
    not (is_built() or os.environ.get("CI")), reason="built with KVMERGE_SERVER=OFF"
)

PROMPT = pocket.make_prompt(np.random.default_rng(50), 1, tasks=["letter_of"], n_questions=1)


class Pictures(BaseHTTPRequestHandler):
    """Serves one picture under several names."""

    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        name = self.path.lstrip("/")
        if name.startswith("again"):
            self.send_response(302)
            self.send_header("Location", {"again": "/picture", "again-again": "/again-again"}[name])
            self.end_headers()
            return
        if name == "none":
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        data = io.BytesIO()
        PROMPT.pictures[0].image.save(data, "PNG")
        try:
            if name == "slow":
                for byte in data.getvalue():
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    time.sleep(0.5)
            elif name == "large":
                for _ in range(20):
                    self.wfile.write(bytes(2**20))
            else:
                self.wfile.write(data.getvalue())
        except OSError:  # the server has had enough
            pass

    def log_message(self, *words: Any) -> None:
        """Be quiet."""


@pytest.fixture(scope="module")
def pictures() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Pictures) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def show(server: Server, url: str) -> Answer:
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": PROMPT.questions[0].text},
    ]
    return server.chat([{"role": "user", "content": content}])


def test_nothing_is_fetched_unless_told(pictures: int) -> None:
    with serving("--kv-merge", "auto", "--parallel", "1") as server:
        Pictures.asked.clear()
        answer = show(server, f"http://127.0.0.1:{pictures}/picture")
        assert answer.status == 400
        assert "--media-url" in answer["error"]["message"]
        assert Pictures.asked == []


@pytest.fixture(scope="module")
def public() -> Iterator[Server]:
    with serving("--parallel", "1", LLAMA_ARG_MEDIA_URL="public") as server:
        yield server


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "0.0.0.0",
        "127.1",
        "2130706433",
        "0x7f000001",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[fd00::1]",
        "[fe80::1]",
        "169.254.169.254",
        "10.0.0.1",
        "172.20.1.1",
        "192.168.1.1",
        "100.64.0.1",
        "user:word@127.0.0.1",
    ],
)
def test_public_is_not_this_network(public: Server, pictures: int, host: str) -> None:
    Pictures.asked.clear()
    began = time.monotonic()
    answer = show(public, f"http://{host}:{pictures}/picture")
    assert answer.status == 400
    assert "own network" in answer["error"]["message"]
    assert Pictures.asked == []
    assert time.monotonic() - began < 5, "it was refused, not tried"


@pytest.mark.parametrize("url", ["https://127.0.0.1/x", "http://", "http://[::1/x", "httpx://a/b"])
def test_urls_that_are_none(public: Server, url: str) -> None:
    answer = show(public, url)
    assert answer.status == 400
    assert "was not fetched" in answer["error"]["message"]


@pytest.fixture(scope="module")
def anywhere() -> Iterator[Server]:
    with serving("--parallel", "1", "--media-url", "any") as server:
        yield server


def test_any_is_fetched(anywhere: Server, pictures: int) -> None:
    for name in ("picture", "again"):
        answer = show(anywhere, f"http://127.0.0.1:{pictures}/{name}")
        assert answer.status == 200, answer
        question = PROMPT.questions[0]
        assert pocket.score(question.task, answer.text, question.answer) == 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("again-again", "3 other places"),
        ("large", "too large"),
        ("slow", ""),
        ("none", "404"),
    ],
)
def test_limits(anywhere: Server, pictures: int, name: str, reason: str) -> None:
    began = time.monotonic()
    answer = show(anywhere, f"http://127.0.0.1:{pictures}/{name}")
    assert answer.status == 400
    assert "was not fetched" in answer["error"]["message"]
    assert reason in answer["error"]["message"]
    assert time.monotonic() - began < 30
    assert anywhere.get("/health")["status"] == "ok"


def test_a_word_that_is_none_of_them() -> None:
    assert "none, public, any" in refusal("--media-url", "all")
