"""Get the pictures and sounds that messages refer to."""

from __future__ import annotations

import base64
import binascii
import hashlib
import http.client
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import MediaError

ACCEPTED_SOURCES = (
    "a path, a file://, http:// or https:// URL, a data: URI, bytes, or a PIL.Image.Image"
)
ACCEPTED_FORMATS = {
    "image": "JPEG, PNG, BMP, GIF, TGA, PSD or PNM, and with Pillow all that it opens",
    "audio": "WAV, MP3 or FLAC",
}
URL_TIMEOUT_S = 30
MAX_BYTES = 256 * 1024 * 1024

_PART_TYPES = {
    "image_url": "image",
    "image": "image",
    "input_audio": "audio",
    "audio_url": "audio",
}
_SHOWN = 80


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
    """

    number: int
    modality: str
    source: Any

    @property
    def label(self) -> str:
        """How error messages call it."""
        kind = "picture" if self.modality == "image" else "sound"
        source = self.source
        if isinstance(source, (bytes, bytearray, memoryview)):
            shown = f"{len(bytes(source))} bytes"
        elif isinstance(source, (str, os.PathLike)):
            shown = os.fsdecode(source)
            shown = shown if len(shown) <= _SHOWN else shown[: _SHOWN - 1] + "…"
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
    def data(self) -> bytes:
        """The bytes of the file.

        Raises
        ------
        MediaError
            If they cannot be had.
        """
        source = self.source
        if isinstance(source, (bytes, bytearray, memoryview)):
            data = bytes(source)
        elif isinstance(source, os.PathLike):
            data = self._from_file(Path(source))
        elif isinstance(source, str):
            data = self._from_string(source)
        elif hasattr(source, "save") and hasattr(source, "convert"):
            data = _png(source)
        else:
            raise self.error(f"is of type {type(source).__name__}")
        if not data:
            raise self.error("is empty")
        return data

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the bytes, in hex."""
        return hashlib.sha256(self.data).hexdigest()

    def _from_string(self, url: str) -> bytes:
        scheme = url.partition(":")[0].lower() if ":" in url[:32] else ""
        if scheme == "data":
            return self._from_data_uri(url)
        if scheme in ("http", "https"):
            return self._from_url(url)
        if scheme == "file":
            try:
                parts = urllib.parse.urlsplit(url)
            except ValueError as error:
                raise self.error(f"is not a URL: {error}") from error
            if parts.netloc not in ("", "localhost"):
                raise self.error(f"is on another machine ({parts.netloc})")
            return self._from_file(Path(urllib.request.url2pathname(parts.path)))
        if len(scheme) > 1 and "://" in url:
            raise self.error(f"has a URL of the kind {scheme}://, which is not fetched")
        return self._from_file(Path(url).expanduser())

    def _from_data_uri(self, uri: str) -> bytes:
        head, comma, body = uri.partition(",")
        if not comma:
            raise self.error("is a data: URI without a comma")
        if not head.lower().endswith(";base64"):
            return urllib.parse.unquote_to_bytes(body)
        try:
            return base64.b64decode(urllib.parse.unquote(body), validate=True)
        except (binascii.Error, ValueError) as error:
            raise self.error(f"is a data: URI whose base64 is broken ({error})") from error

    def _from_file(self, file: Path) -> bytes:
        try:
            if file.is_dir():
                raise self.error("is a folder")
            return file.read_bytes()
        except FileNotFoundError as error:
            raise self.error("does not exist") from error
        except (OSError, ValueError) as error:
            raise self.error(f"cannot be read: {error}") from error

    def _from_url(self, url: str) -> bytes:
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "kvmerge"})
            with urllib.request.urlopen(request, timeout=URL_TIMEOUT_S) as response:
                data: bytes = response.read(MAX_BYTES + 1)
        except urllib.error.HTTPError as error:
            raise self.error(f"was refused: HTTP {error.code} {error.reason}") from error
        except urllib.error.URLError as error:
            raise self.error(f"cannot be reached: {error.reason}") from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self.error(f"cannot be fetched: {error}") from error
        if len(data) > MAX_BYTES:
            raise self.error(f"is larger than {MAX_BYTES // (1024 * 1024)} MiB")
        return data


def _png(image: Any) -> bytes:
    import io

    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def as_png(data: bytes) -> bytes | None:
    """Return a picture that llama.cpp does not read itself as PNG, or None if it is not one."""
    import io

    try:
        from PIL import Image
    except ImportError:
        return None
    try:
        return _png(Image.open(io.BytesIO(data)))
    except Exception:  # Pillow's plug-ins raise whatever they like on damaged files.
        return None


def media_type(part: Any) -> str | None:
    """Return ``"image"`` or ``"audio"`` for a content part that is one, else None."""
    if not isinstance(part, Mapping):
        return None
    return _PART_TYPES.get(str(part.get("type")))


def _source(part: Mapping[str, Any], number: int, modality: str) -> Any:
    name = str(part["type"])
    source = part.get(name)
    if isinstance(source, Mapping):
        for key in ("url", "data"):
            if key in source:
                source = source[key]
                break
        if name == "input_audio" and isinstance(source, str):
            source = f"data:;base64,{source}"
    if source is None or isinstance(source, Mapping):
        raise MediaPart(number, modality, source).error(f"has no {name!r} content")
    return source


def find_media(messages: Iterable[Mapping[str, Any]]) -> list[MediaPart]:
    """Return the pictures and sounds of messages in order."""
    found: list[MediaPart] = []
    counts = {"image": 0, "audio": 0}
    for message in messages:
        content = message.get("content")
        if not isinstance(content, (list, tuple)):
            continue
        for part in content:
            modality = media_type(part)
            if modality is not None:
                counts[modality] += 1
                source = _source(part, counts[modality], modality)
                found.append(MediaPart(counts[modality], modality, source))
    return found
