"""``kvmerge chat``, typed into a terminal."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvmerge import cli, pocket
from kvmerge.commands import chat
from kvmerge.progress import ReadingProgress

fcntl = pytest.importorskip("fcntl")
pty = pytest.importorskip("pty")
termios = pytest.importorskip("termios")

PROMPT = b"> "
FLOOR = ("--image-min-tokens", "40")


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


def test_pictures_are_read_as_fewer_tokens(pictures: list[Path]) -> None:
    cells = []
    for options in ([], ["--image-merge", "0.9"], ["--image-merge", "0.9", *FLOOR]):
        with talking("--max-tokens", "1", "--kv-merge", "none", *options) as terminal:
            terminal.ask("/image " + " ".join(f"'{file}'" for file in pictures))
            terminal.ask("What is it?")
            stats = terminal.ask("/stats")
            cells.append(int(stats.split("tokens seen")[1].split()[0].replace(",", "")))
    whole, merged, floored = cells
    assert whole - merged > 100
    assert merged < floored <= whole - 4 * (64 - 40)


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


@pytest.mark.slow  # through a real terminal: on a busy machine the key may come after the answer
def test_an_interrupt_stops_the_answer_and_not_the_program(pictures: list[Path]) -> None:
    with talking() as terminal:
        terminal.ask("/image " + " ".join(f"'{file}'" for file in pictures * 8))
        terminal.type("List all letters in order.\n")
        # Ctrl-C throws away what is typed and not read: so not before the pictures are being read.
        terminal.until(b"] ")
        os.kill(terminal.process.pid, signal.SIGSTOP)  # it cannot get done before the interrupt
        terminal.type("\x03")
        os.kill(terminal.process.pid, signal.SIGCONT)
        assert "[stopped]" in terminal.until()
        terminal.type("\x03")
        assert "/quit leaves" in terminal.until()
        # What was stopped was not said; the pictures are still to be shown.
        assert "33 to be shown" in terminal.ask(f"/image '{pictures[0]}'")
        assert terminal.process.poll() is None
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0


def interrupted() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0)  # handlers run between two instructions


@pytest.mark.parametrize("moment", ["typing", "before", "picture 1", "picture 3", "answer"])
def test_an_interrupt_at_every_moment(
    moment: str,
    pictures: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process, so that each comes exactly where it is to come, and once."""
    due = [moment]

    def at(here: str) -> None:
        if due == [here]:
            due.clear()
            interrupted()

    lines = ["/image " + " ".join(f"'{file}'" for file in pictures), "Which letters?", "Who?"]

    def typed(prompt: str) -> str:
        if len(lines) == 2:
            at("typing")
        if not lines:
            raise EOFError
        return lines.pop(0)

    say, watch, shown = chat.Conversation.say, chat.Watch.__call__, print

    def before(self: chat.Conversation, text: str) -> None:
        at("before")
        say(self, text)

    def reads(self: chat.Watch, progress: ReadingProgress) -> bool:
        at(f"picture {progress.media}")
        return watch(self, progress)

    def prints(*words: str, **options: Any) -> None:
        shown(*words, **options)
        if options.get("flush"):
            at("answer")

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(chat.Conversation, "say", before)
    monkeypatch.setattr(chat.Watch, "__call__", reads)
    monkeypatch.setattr(chat, "print", prints, raising=False)
    before_all = signal.getsignal(signal.SIGINT)
    options = ["--mmproj", os.fspath(pocket.mmproj_path()), "--threads", "1", "--max-tokens", "6"]
    status = cli.main(["chat", os.fspath(pocket.model_path()), *options, "--temperature", "0"])
    said = capsys.readouterr()
    assert status == 0, said.err
    assert due == lines == []
    if moment == "typing":
        assert "/quit leaves" in said.out and "[stopped]" not in said.out
    else:
        assert said.out.count("[stopped]") == 1
    assert said.err == ""
    assert signal.getsignal(signal.SIGINT) is before_all
