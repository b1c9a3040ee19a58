"""``kvmerge chat``, typed into a terminal."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import kvmerge  # noqa: F401
from kvmerge import pocket

fcntl = pytest.importorskip("fcntl")
pty = pytest.importorskip("pty")
termios = pytest.importorskip("termios")

PROMPT = b"> "


class Terminal:
    """A process at the other end of a pseudo terminal."""

    def __init__(self, process: subprocess.Popen[bytes], end: int) -> None:
        self.process = process
        self._end = end

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def until(self, ending: bytes = b"\n" + PROMPT, seconds: float = 120) -> str:
        """Return what is printed up to a text."""
        printed, limit = b"", time.monotonic() + seconds
        while ending not in printed.replace(b"\r", b""):
            left = limit - time.monotonic()
            assert left > 0 and select.select([self._end], [], [], left)[0], printed.decode()
            try:
                printed += os.read(self._end, 4096)
            except OSError:
                break
        return printed.replace(b"\r", b"").decode()

    def ask(self, line: str) -> str:
        self.type(line + "\n")
        return self.until()


@contextmanager
def talking(*options: str) -> Iterator[Terminal]:
    own, other = pty.openpty()
    line = [sys.executable, "-m", "kvmerge", "chat", os.fspath(pocket.model_path())]
    line += ["--mmproj", os.fspath(pocket.mmproj_path()), "--threads", "1", "--n-ctx", "4096"]
    process = subprocess.Popen(
        [*line, "--temperature", "0", *options],
        stdin=other,
        stdout=other,
        stderr=other,
        start_new_session=True,
        # Ctrl-C then reaches it.
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        env=os.environ | {"TERM": "dumb"},
    )
    os.close(other)
    terminal = Terminal(process, own)
    try:
        terminal.until()
        yield terminal
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(60)
        os.close(own)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    prompt = pocket.make_prompt(np.random.default_rng(3), 4)
    files = [tmp_path / f"picture {i}.png" for i in range(4)]
    for file, picture in zip(files, prompt.pictures, strict=True):
        picture.image.save(file)
    return files


def test_a_conversation_with_pictures(pictures: list[Path], tmp_path: Path) -> None:
    prompt = pocket.make_prompt(np.random.default_rng(3), 4)
    first = prompt.pictures[0]
    with talking("--max-tokens", "8") as terminal:
        shown = terminal.ask("/image " + " ".join(f"'{file}'" for file in pictures))
        assert "4 to be shown" in shown
        answer = terminal.ask(f"Which letter is on the {first.colour} {first.shape}?")
        assert first.letter in answer.split("?", 1)[1]
        stats = terminal.ask("/stats")
        assert "merges          1" in stats
        kept = tmp_path / "kept chat"
        assert "kept in" in terminal.ask(f"/save {kept}")
        assert "forgotten" in terminal.ask("/reset")
        assert "tokens seen     0" in terminal.ask("/stats")
        assert "2 messages" in terminal.ask(f"/load {kept}")
        again = terminal.ask(f"Which letter is on the {first.colour} {first.shape}?")
        assert first.letter in again.split("?", 1)[1]
        terminal.type("/quit\n")
        assert terminal.process.wait(60) == 0


def test_bad_commands_are_said_and_nothing_is_lost(pictures: list[Path]) -> None:
    with talking("--max-tokens", "4") as terminal:
        assert "there is no /nope" in terminal.ask("/nope")
        assert "needs the name of a file" in terminal.ask("/image")
        assert "there is no file" in terminal.ask("/image /nowhere/at/all.png")
        assert "cannot be read" in terminal.ask("/load /nowhere/at/all")
        assert "nothing to save" in terminal.ask("/save kept")
        broken = pictures[0].with_name("broken.png")
        broken.write_bytes(b"no picture")
        terminal.ask(f"/image '{broken}'")
        assert "picture 1" in terminal.ask("What is it?")
        assert "forgotten" in terminal.ask("/reset")
        assert terminal.ask("Hello")
        assert terminal.process.poll() is None


@pytest.mark.slow  # when the interrupt comes depends on how busy the machine is
def test_an_interrupt_stops_the_answer_and_not_the_program(pictures: list[Path]) -> None:
    with talking() as terminal:
        terminal.ask("/image " + " ".join(f"'{file}'" for file in pictures * 8))
        terminal.type("List all letters in order.\n")
        time.sleep(0.1)
        terminal.type("\x03")
        assert "[stopped]" in terminal.until()
        terminal.type("\x03")
        assert "/quit leaves" in terminal.until()
        # What was stopped was not said; the pictures are still to be shown.
        assert "33 to be shown" in terminal.ask(f"/image '{pictures[0]}'")
        assert terminal.process.poll() is None
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
