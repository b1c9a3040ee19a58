"""How far the reading of a prompt is: what a callback is told, and a bar that shows it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TextIO

from .errors import OptionError, StoppedError
from .prompt import Media

_SHOWN_AFTER = 1.0
"""Seconds that reading takes before the bar appears."""
_BETWEEN = 0.1
"""Seconds between two states of the bar."""
_WIDTH = 24


@dataclass(frozen=True)
class ReadingProgress:
    """How far the reading of a prompt is.

    Attributes
    ----------
    tokens, n_tokens : int
        Tokens that were read, and all that are to be read: those that the cache held already are
        none of them.
    media, n_media : int
        The picture or sound that is read or encoded now, counted from 1 (0 before the first), and
        how many there are to be read.
    encoding : bool
        Whether it is being encoded now.
    seconds : float
        Since the reading began.
    seconds_left : float or None
        What the rest will take, as tokens and pictures have taken so far; None as long as nothing
        is known.
    """

    tokens: int
    n_tokens: int
    media: int
    n_media: int
    encoding: bool = False
    seconds: float = 0.0
    seconds_left: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second, the time in the encoder included."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    def __str__(self) -> str:
        parts = []
        if self.n_media and self.media:
            doing = "encoding" if self.encoding else "reading"
            parts.append(f"{doing} picture {self.media} of {self.n_media}")
        parts.append(f"{self.tokens} of {self.n_tokens} tokens")
        if self.tokens:
            parts.append(f"{self.tokens_per_second:.0f} tokens/s")
        if self.seconds_left is not None:
            parts.append(f"{_duration(self.seconds_left)} left")
        return ", ".join(parts)


Listener = Callable[[ReadingProgress], object]
"""Is called with how far reading is; what it returns is left alone, unless it is False."""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def listener_of(value: object, verbose: bool) -> Listener | None:
    """Return what ``progress=`` of a `Llama` means.

    Raises
    ------
    OptionError
        If it means nothing.
    """
    if value is None:
        value = verbose and sys.stderr is not None and sys.stderr.isatty()
    if value is False:
        return None
    if value is True:
        return Bar()
    if callable(value):
        return value
    raise OptionError(
        f"progress={value!r}: progress must be True for a bar, False for none, or something that "
        "can be called with a kvmerge.progress.ReadingProgress"
    )


class Bar:
    """Shows how far reading is, in one line that goes when it is done.

    Parameters
    ----------
    stream : text file, optional
        Where it is written; standard error unless given.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._shown_at = -1.0
        self._length = 0

    def __call__(self, progress: ReadingProgress) -> None:
        """Show it, if it is time to."""
        done = progress.tokens == progress.n_tokens
        if progress.tokens == 0 and not progress.media:
            self._shown_at = -1.0
        if done:
            self._write("")
        elif progress.seconds >= max(_SHOWN_AFTER, self._shown_at + _BETWEEN):
            self._shown_at = progress.seconds
            filled = _WIDTH * progress.tokens // max(progress.n_tokens, 1)
            self._write(f"[{'#' * filled:<{_WIDTH}}] {progress}")

    def close(self) -> None:
        """Take the line away."""
        self._write("")

    def _write(self, line: str) -> None:
        if not line and not self._length:
            return
        stream = sys.stderr if self._stream is None else self._stream
        try:
            stream.write("\r" + line.ljust(self._length) + ("" if line else "\r"))
            stream.flush()
        except (OSError, ValueError):  # Nobody is there to see it.
            pass
        self._length = len(line)


class Meter:
    """Counts what is read of one prompt, and reports it.

    Parameters
    ----------
    listener : callable
        See `Listener`.
    n_tokens : int
        Tokens that there are to read.
    media : list of Media
        Pictures and sounds among them, each slice of one.

    Raises
    ------
    StoppedError
        From every method, if the listener returns False.
    """

    def __init__(self, listener: Listener, n_tokens: int, media: Sequence[Media]) -> None:
        self._listener = listener
        n_media = sum(each.number == 0 for each in media)
        self._state = ReadingProgress(0, n_tokens, 0, n_media)
        self._start = self._last = time.monotonic()
        self._encoding_seconds = 0.0
        self._media_tokens_left = sum(each.n_tokens for each in media)
        self._media_tokens = 0
        self._tell()

    def begin(self, media: Media) -> None:
        """Note that a picture or sound, or a slice of one, comes next."""
        n = self._state.media + (media.number == 0)
        self._state = replace(self._state, media=n, encoding=True)
        self._tell()

    def encoded(self, media: Media) -> None:
        """Note that it has been encoded, or was found where it is kept."""
        self._encoding_seconds += time.monotonic() - self._last
        self._media_tokens += media.n_tokens
        self._media_tokens_left -= media.n_tokens
        self._state = replace(self._state, encoding=False)
        self._tell()

    def read(self, n_tokens: int) -> None:
        """Note that so many tokens were read."""
        self._state = replace(self._state, tokens=self._state.tokens + n_tokens)
        self._tell()

    def close(self) -> None:
        """Note that there is nothing more to report."""
        close = getattr(self._listener, "close", None)
        if close is not None:
            close()

    def _tell(self) -> None:
        state, now = self._state, time.monotonic()
        self._last = now
        self._state = replace(
            state, seconds=now - self._start, seconds_left=self._left(now - self._start)
        )
        if self._listener(self._state) is False:
            raise StoppedError(
                f"reading was stopped by progress= after {state.tokens} of {state.n_tokens} "
                "tokens; what was read is in the cache, and the same chat goes on from there"
            )
        self._last = time.monotonic()

    def _left(self, seconds: float) -> float | None:
        state = self._state
        if not state.tokens:
            return None
        reading = (seconds - self._encoding_seconds) / state.tokens
        left = reading * (state.n_tokens - state.tokens)
        if self._media_tokens:
            # Of those that come as many are found as of those that came.
            left += self._encoding_seconds / self._media_tokens * self._media_tokens_left
        return left
