"""Output that arrives: in any encoding, and without a fuss when nobody reads it any more."""

from __future__ import annotations

import codecs
import os
import sys
from contextlib import suppress
from typing import TextIO

_PLAIN = {"✓": "(right)", "✗": "(wrong)", "×": "x", "−": "-", "–": "-", "…": "..."}
"""What is written for a mark that an encoding does not have; "?" for any other character."""

_ERRORS = "kvmerge.plain"


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(_PLAIN.get(character, "?") for character in missing), error.end


codecs.register_error(_ERRORS, _plain)


def accept_any_text() -> None:
    """Let stdout and stderr take every text, whatever their encoding is."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=_ERRORS)


def complain(text: str) -> None:
    """Write a line to stderr, if anybody is there to read it."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def discard(stream: TextIO) -> None:
    """Let what a stream still holds, and all that follows, go nowhere.

    A stream whose other end is gone would otherwise complain once more when Python ends.
    """
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
