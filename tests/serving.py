"""`kvmerge serve` as a process, and what a client does with it."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvmerge import pocket
from kvmerge.commands.serve import program

START = 120
"""Seconds that a server may take to load the pocket model on a busy machine."""


class Answer(dict[str, Any]):
    """What the server sent, and its status."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(body)
        self.status = status

    @property
    def text(self) -> str:
        """The text of a chat completion."""
        return str(self["choices"][0]["message"]["content"]).strip()

    @property
    def cached(self) -> int:
        """Tokens of the prompt that were not read again."""
        return int(self["timings"]["cache_n"])


class Server:
    """A server that answers; `log` is what it has said."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self._log = log

    @property
    def log(self) -> str:
        """What it has said so far."""
        return self._log.read_text(errors="replace")

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        """Return the status and the text of an answer."""
        connection = self.connect()
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        status, text = self.request("GET", path)
        assert status == 200, text
        return json.loads(text)

    def post(self, path: str, body: Any) -> Answer:
        status, text = self.request("POST", path, body)
        return Answer(status, json.loads(text))

    def chat(self, messages: Any, **options: Any) -> Answer:
        return self.post("/v1/chat/completions", chat_body(messages, **options))

    def stream(self, messages: Any, **options: Any) -> list[Any]:
        """Return the chunks of a streamed answer."""
        status, text = self.request(
            "POST", "/v1/chat/completions", chat_body(messages, stream=True, **options)
        )
        assert status == 200, text
        events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        return [json.loads(event) for event in events[:-1]]

    def held(self) -> dict[str, Any]:
        """Return what the slots hold together, when none of them is busy."""
        for _ in range(300):
            slots = self.get("/slots")
            if not any(slot["is_processing"] for slot in slots):
                break
            time.sleep(0.1)
        figures = [slot["kv_merge"] for slot in slots]
        return {name: sum(slot[name] for slot in figures) for name in figures[0]}


def chat_body(messages: Any, **options: Any) -> dict[str, Any]:
    greedy = {"temperature": 0.0, "max_tokens": 24, "messages": messages}
    return greedy | options


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def command(*flags: str, model: Path | None = None) -> list[str]:
    own = [] if model else ["--mmproj", os.fspath(pocket.mmproj_path())]
    return [
        *(sys.executable, "-m", "kvmerge", "serve", os.fspath(model or pocket.model_path())),
        *own,
        *("--threads", "1", "--ctx-size", "4096", "--no-warmup", *flags),
    ]


@contextmanager
def serving(
    *flags: str, line: list[str] | None = None, ends: bool = False, **environment: str
) -> Iterator[Server]:
    """Start a server with flags, or by a command line without a port, and stop it in the end.

    It must be there then, unless it `ends` before.
    """
    port = free_port()
    line = [*(line or command(*flags)), "--port", str(port)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        with path.open("wb") as log:
            process = subprocess.Popen(
                line, stdout=log, stderr=subprocess.STDOUT, env=os.environ | environment
            )
        server = Server(process, port, path)
        try:
            for _ in range(START * 10):
                assert process.poll() is None, server.log
                try:
                    if server.request("GET", "/health")[0] == 200:
                        break
                except OSError:
                    pass
                time.sleep(0.1)
            else:
                raise AssertionError(f"the server did not start: {server.log}")
            yield server
            assert ends or process.poll() is None, server.log[-4000:]
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server, by one signal."""
    process.terminate()
    process.wait(60)


def refusal(*flags: str, model: Path | None = None) -> str:
    """Return what a server says that refuses to start."""
    run = subprocess.run(
        [*command(*flags, model=model), "--port", str(free_port())],
        capture_output=True,
        text=True,
        timeout=START,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    assert "Traceback" not in run.stderr
    return run.stdout + run.stderr


def is_built() -> bool:
    """Return whether the package has a server: a developer's build may leave it out."""
    from kvmerge.errors import LibraryError

    try:
        program()
    except LibraryError:
        return False
    return True
