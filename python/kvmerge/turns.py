"""Who may use a model next: one call at a time, a stream while the cache is still its own."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import wraps
from types import TracebackType
from typing import Any, TypeVar

from .errors import ClosedError, ForkedError, StateError

Method = TypeVar("Method", bound=Callable[..., Any])

_caller: ContextVar[object | None] = ContextVar("kvmerge_caller", default=None)


def _this_caller() -> object:
    """Return what stays the same while one piece of code goes on.

    A plain script is one caller.  A framework that runs each request in a copy of its context,
    as FastAPI does, makes one of every request.
    """
    caller = _caller.get()
    if caller is None:
        caller = object()
        _caller.set(caller)
    return caller


def _has_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class Stream(Generator[Any, Any, None]):
    """An answer that is read step by step, each of which is one call; `Turns.stream` makes it.

    Raises
    ------
    StateError
        From a step, if something else was read since the one before: the cache is no longer this
        stream's.
    """

    def __init__(self, turns: Turns, chunks: Iterator[Any], keeps_turn: bool) -> None:
        self._turns = turns
        self._chunks = chunks
        self.keeps_turn = keeps_turn
        self.has_begun = False
        self.is_stepping = False
        self.is_lost = False
        self.note_reader()

    def note_reader(self) -> None:
        """Note who reads this stream."""
        self._caller, self._thread = _this_caller(), threading.get_ident()

    def would_block(self) -> bool:
        """Whether waiting for the end of this stream could wait for ever.

        It could where the code that waits is the one that reads the stream, or runs in the same
        event loop.
        """
        in_same_loop = self._thread == threading.get_ident() and _has_event_loop()
        return self._caller is _this_caller() or in_same_loop

    def send(self, value: Any) -> Any:
        """Return the next part."""
        with self._turns.step(self):
            if value is None:
                return next(self._chunks)
            return self._chunks.send(value)  # type: ignore[attr-defined]

    def throw(
        self,
        kind: type[BaseException] | BaseException,
        error: BaseException | object = None,
        trace: TracebackType | None = None,
    ) -> Any:
        """End the stream with an exception."""
        self.close()
        raise kind

    def close(self) -> None:
        """End the stream; what waits for its end goes on."""
        with self._turns.look():
            close = getattr(self._chunks, "close", None)
            if close is not None:
                close()
            self._turns.end(self)

    def __del__(self) -> None:
        self.close()


class Turns:
    """One call at a time, of a model that is open and in the process that made it.

    A call that finds another thread at work waits.  A stream keeps its turn until it has ended, so
    that calls of other threads wait for its end; a call of the code that reads the stream does not
    wait for itself: it takes the turn, and the stream raises when it goes on.

    Attributes
    ----------
    is_closing, is_closed : bool
        Whether the model is being closed, and whether it is.
    """

    def __init__(self) -> None:
        self.is_closing = self.is_closed = False
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._ended = threading.Condition(self._lock)
        # Weak: a stream that nobody reads any more is no reason to wait.
        self._held_by: weakref.ref[Stream] | None = None
        self._depth = 0  # calls and steps that are running, each inside the one before

    @property
    def is_of_this_process(self) -> bool:
        """Whether the process has not forked since."""
        return self._process == os.getpid()

    def check_open(self) -> None:
        """Raise if the model can no longer be used.

        Raises
        ------
        ClosedError
            If it is closed.
        ForkedError
            If it belongs to another process.
        """
        if self.is_closed or self.is_closing:
            raise ClosedError("this Llama is closed: make a new one")
        if self._process != os.getpid():
            raise ForkedError(
                "this Llama was made before the process forked, and its threads are not in the "
                "new process: make a new Llama there, or start processes with "
                'multiprocessing.set_start_method("spawn")'
            )

    @property
    def _holder(self) -> Stream | None:
        return None if self._held_by is None else self._held_by()

    @contextmanager
    def look(self) -> Iterator[None]:
        """Wait for a call or step that is running; for what changes nothing."""
        with self._lock:
            yield

    @contextmanager
    def call(self, *, ends_streams: bool = False) -> Iterator[None]:
        """Wait for a turn; for what changes what the cache holds.

        Parameters
        ----------
        ends_streams : bool
            Take the turn from a stream instead of waiting for its end, whoever reads it.
        """
        with self._lock:
            self._take(ends_streams)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1

    def _take(self, ends_streams: bool = False) -> None:
        # A stream that is stepping while this thread has the lock is what called us.
        while (holder := self._holder) is not None and not holder.is_stepping:
            if ends_streams or holder.would_block():
                # One that has not begun may still begin: nothing of it depends on the cache yet.
                holder.is_lost = ends_streams or holder.has_begun
                self.end(holder)
            else:
                del holder  # lest the one that waits keeps it alive
                self._ended.wait()

    def stream(self, chunks: Iterator[Any]) -> Stream:
        """Return a stream that keeps the turn of the call that makes it.

        One that is made inside another call or step is part of that.
        """
        stream = Stream(self, chunks, keeps_turn=self._depth == 1)
        if stream.keeps_turn:
            self._held_by = weakref.ref(stream)
        return stream

    @contextmanager
    def step(self, stream: Stream) -> Iterator[None]:
        """Run one step of a stream."""
        with self._lock:
            if stream.is_lost:
                raise StateError(
                    "something else was read or answered before this stream ended: read a stream "
                    "to its end first, or use one Llama for each"
                )
            if stream.keeps_turn and self._holder is not stream:
                self._take()
                self._held_by = weakref.ref(stream)
            stream.has_begun = stream.is_stepping = True
            self._depth += 1
            try:
                yield
            except BaseException:
                self.end(stream)
                raise
            finally:
                self._depth -= 1
                stream.is_stepping = False
                stream.note_reader()

    def end(self, stream: Stream) -> None:
        """Give back the turn of a stream."""
        with self._lock:
            if self._holder in (stream, None):
                self._held_by = None
                self._ended.notify_all()


def _inside(scope: Callable[[Turns], AbstractContextManager[None]]) -> Callable[[Method], Method]:
    """Return a decorator for methods of a `Llama`, which run inside a scope, on an open model."""

    def decorate(method: Method) -> Method:
        @wraps(method)
        def scoped(self: Any, *args: Any, **options: Any) -> Any:
            turns: Turns = self.turns
            turns.check_open()
            with scope(turns):
                turns.check_open()  # again: it may have been closed while this waited
                return method(self, *args, **options)

        return scoped  # type: ignore[return-value]

    return decorate


takes_turn = _inside(Turns.call)
"""Make a method of a `Llama` one call, which waits for its turn."""

looks = _inside(Turns.look)
"""Make a method of a `Llama` that changes nothing wait for a call that is running."""
