"""Get the pictures and sounds that messages refer to."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import re
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..chat.messages import MEDIA_TYPES, media_source
from ..errors import MediaError
from .access import AccessError, MediaAccess
from .picture import PictureError, picture_of, size_of

ACCEPTED_SOURCES = (
    "a path, a file://, http:// or https:// URL, a data: URI, base64, bytes, an open file, a "
    "PIL.Image.Image, or a NumPy array"
)
ACCEPTED_FORMATS = {
    "image": "JPEG, PNG, GIF, WebP, BMP, TIFF and all else that Pillow opens",
    "audio": "WAV, MP3 or FLAC",
}

_SHOWN = 80
_LONGEST_PATH = 1 << 15
_BASE64 = re.compile(r"[A-Za-z0-9+/_=\s-]*")
_WRITTEN_AS_BYTES = re.compile(rb"\s*data:|[A-Za-z0-9+/_=\s-]{16,}\Z", re.IGNORECASE)
"""Text that is still the bytes that ``base64.b64encode`` gives."""

_SOUND = re.compile(rb"RIFF....WAVE|ID3|fLaC|\xff[\xe0-\xff]", re.DOTALL)


@dataclass(frozen=True)
class MediaPart:
    """A picture or sound of a message.

    Attributes
    ----------
    number : int
        Counted from 1 over all of its kind in the messages.
    modality : str
        ``"image"`` or ``"audio"``.
    source : object
        What the message gives: see `ACCEPTED_SOURCES`.
    access : MediaAccess
        Which files and URLs may be read.
    """

    number: int
    modality: str
    source: Any
    access: MediaAccess = field(default_factory=MediaAccess.everything)

    @property
    def label(self) -> str:
        """How error messages call it."""
        kind = "picture" if self.modality == "image" else "sound"
        source = self.source
        if isinstance(source, (bytes, bytearray, memoryview)):
            shown = f"{memoryview(source).nbytes} bytes"
        elif isinstance(source, (str, os.PathLike)):
            shown = os.fsdecode(source)
            shown = shown if len(shown) <= _SHOWN else shown[: _SHOWN - 1] + "…"
            shown = shown.encode("utf-8", "backslashreplace").decode()
        else:
            shown = type(source).__name__
        return f"{kind} {self.number} ({shown})"

    def error(self, reason: str) -> MediaError:
        """Return an exception that names this part and what is accepted."""
        return MediaError(
            f"{self.label} {reason}. Accepted: {ACCEPTED_SOURCES}; "
            f"{ACCEPTED_FORMATS[self.modality]}"
        )

    @cached_property
    def content(self) -> bytes | Image.Image:
        """The bytes of the file; the picture itself where it is one of Pillow or an array.

        Raises
        ------
        MediaError
            If they cannot be had.
        """
        source = self.source
        if self.modality == "image" and isinstance(source, (Image.Image, np.ndarray)):
            return self._picture(source)
        if isinstance(source, (bytes, bytearray, memoryview)):
            data = bytes(source)
        elif isinstance(source, (str, os.PathLike)):
            data = self._named()
        elif callable(getattr(source, "read", None)):
            data = self._opened(source)
        else:
            raise self.error(f"is of type {type(source).__name__}")
        if not data:
            raise self.error("is empty")
        return data

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the bytes, in hex; of size and pixels where it is no file."""
        content = self.content
        if isinstance(content, bytes):
            return hashlib.sha256(content).hexdigest()
        size = b"%d %d " % content.size
        return hashlib.sha256(size + content.tobytes()).hexdigest()

    @cached_property
    def file(self) -> Path | None:
        """The file that is named, if one is.

        Raises
        ------
        MediaError
            If it is not there or may not be read.
        """
        source = self.source
        if isinstance(source, (str, os.PathLike)) and self.url is None and self._inline is None:
            try:
                return self.access.file(self._path(os.fsdecode(source)))
            except AccessError as error:
                raise self.error(str(error)) from error
        return None

    @cached_property
    def url(self) -> str | None:
        """The http:// or https:// URL, if there is one.

        Raises
        ------
        MediaError
            If it may not be fetched.
        """
        source = self.source
        if not isinstance(source, str) or _scheme(source) not in ("http", "https"):
            return None
        try:
            self.access.check_url(source.strip())
        except AccessError as error:
            raise self.error(str(error)) from error
        return source.strip()

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height of a picture as a model sees it; a file is only looked into for it.

        Raises
        ------
        MediaError
            If it is none that can be read.
        """
        content = self.content
        if isinstance(content, Image.Image):
            return content.size
        try:
            return size_of(content)
        except PictureError as error:
            raise self.error(str(error)) from error

    def picture(self) -> Image.Image:
        """Return the picture as a model sees it.

        Raises
        ------
        MediaError
            If it is none that can be read.
        """
        content = self.content
        return self._picture(content) if isinstance(content, bytes) else content

    def _picture(self, source: Any) -> Image.Image:
        try:
            return picture_of(source)
        except PictureError as error:
            raise self.error(str(error)) from error

    # Where the bytes come from.

    def _named(self) -> bytes:
        if self._inline is not None:
            return self._inline
        try:
            if self.url is not None:
                return self.access.fetch(self.url)
            assert self.file is not None
            return self.access.read(self.file)
        except AccessError as error:
            raise self.error(str(error)) from error

    def _opened(self, source: Any) -> bytes:
        """Read an open file, and put it back to where it stood, for the next call."""
        most, start, data = self.access.max_bytes, None, bytearray()
        try:
            if hasattr(source, "seekable") and source.seekable():
                start = source.tell()
            # What is not buffered, such as a socket, gives less than it is asked for.
            while (piece := source.read(most + 1 - len(data))) and len(data) <= most:
                if isinstance(piece, str):
                    raise self.error("is a file opened as text: open it with mode 'rb'")
                if not isinstance(piece, (bytes, bytearray)):
                    raise self.error(f"is a file that gives {type(piece).__name__}, not bytes")
                data += piece
            if start is not None:
                source.seek(start)
        except MediaError:
            raise
        except Exception as error:  # It may be an object of any class.
            raise self.error(f"cannot be read: {type(error).__name__}") from error
        if len(data) > most:
            raise self.error(f"is larger than {most} bytes")
        if not data and start:
            raise self.error("is an open file that stands at its end: call its seek(0)")
        return bytes(data)

    @cached_property
    def _inline(self) -> bytes | None:
        """What a string itself contains: a data: URI, or base64 without one, as Ollama takes it."""
        source = self.source
        if not isinstance(source, str):
            return None
        if _scheme(source) == "data":
            return self._from_data_uri(source.strip())
        if len(source) < 16 or not _BASE64.fullmatch(source):
            return None
        try:
            data = decode_base64(source)
        except ValueError:
            return None
        if self.modality == "audio":
            return data if _SOUND.match(data) else None
        try:
            Image.open(io.BytesIO(data)).close()
        except Exception:  # It is something else, such as a path.
            return None
        return data

    def _from_data_uri(self, uri: str) -> bytes:
        head, comma, body = uri.partition(",")
        if not comma:
            raise self.error("is a data: URI without a comma")
        options = [option.strip().lower() for option in head.split(";")[1:]]
        data = urllib.parse.unquote_to_bytes(body.encode("utf-8", "replace"))
        if "base64" not in options:
            return data
        try:
            return decode_base64(data.decode("latin-1"))
        except ValueError as error:
            raise self.error(f"is a data: URI whose base64 is broken ({error})") from error

    def _path(self, name: str) -> Path:
        scheme = _scheme(name)
        if not name.strip():
            raise self.error("is empty")
        if len(name) > _LONGEST_PATH:
            raise self.error(f"has {len(name)} characters, and is no base64 of a {self.modality}")
        if scheme == "file":
            try:
                parts = urllib.parse.urlsplit(name.strip())
            except ValueError as error:
                raise self.error(f"is not a URL: {error}") from error
            if parts.netloc not in ("", "localhost"):
                raise self.error(f"is on another machine ({parts.netloc[:_SHOWN]})")
            return Path(urllib.request.url2pathname(parts.path))
        if len(scheme) > 1 and "://" in name:
            raise self.error(f"has a URL of the kind {scheme}://, which is not fetched")
        return Path(name)


def _scheme(text: str) -> str:
    start = text[:40].lstrip()
    return start.partition(":")[0].lower() if ":" in start else ""


def decode_base64(text: str) -> bytes:
    """Decode base64 as it is found: with line breaks, URL-safe, or without padding.

    Raises
    ------
    ValueError
        If it holds anything else.
    """
    packed = re.sub(r"\s+", "", text).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from error


def as_png(source: Any) -> bytes:
    """Return what a model is shown of a picture as a PNG file, to look at.

    Parameters
    ----------
    source : object
        What a message may give: see `ACCEPTED_SOURCES`.

    Raises
    ------
    MediaError
        If it is no picture that can be read.
    """
    return _png(MediaPart(1, "image", source).picture())


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture_of(picture).save(file, "PNG")
    return file.getvalue()


def find_media(messages: Any, access: MediaAccess | None = None) -> list[MediaPart]:
    """Return the pictures and sounds of messages in order.

    Parameters
    ----------
    messages : list of dict
        As `kvmerge.chat.messages.check_messages` returns them.
    access : MediaAccess, optional
        Which files and URLs may be read; all unless given.

    Raises
    ------
    MediaError
        If a part has no content.
    """
    access = MediaAccess.everything() if access is None else access
    found: list[MediaPart] = []
    counts = {"image": 0, "audio": 0}
    for message in messages:
        content = message.get("content")
        if not isinstance(content, (list, tuple)):
            continue
        for part in content:
            modality = MEDIA_TYPES.get(str(part.get("type"))) if isinstance(part, Mapping) else None
            if modality is not None:
                counts[modality] += 1
                source = media_source(part)
                if source is None:
                    raise MediaPart(counts[modality], modality, None).error(
                        f"has no {part['type']!r} content"
                    )
                if isinstance(source, bytes) and _WRITTEN_AS_BYTES.match(source):
                    source = source.decode("latin-1")
                found.append(MediaPart(counts[modality], modality, source, access))
    return found
