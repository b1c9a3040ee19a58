"""Pictures and sounds as libmtmd takes them, or as nothing but their size where that is known."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from llama_cpp import mtmd_cpp

from ..errors import UnsupportedError
from ..media.image_cache import Encoded, ImageCache
from ..media.part import MediaPart
from ..media.picture import PictureError, is_jpeg_as_it_is

_REMEMBERED = 4096


class Bitmaps:
    """Makes libmtmd's bitmaps, and remembers which media names led to and how large they are.

    Parameters
    ----------
    projector : str
        The mmproj, for error messages.
    encoded : ImageCache
        Where what was encoded is kept.

    Attributes
    ----------
    context : mtmd_context_p or None
        libmtmd's context, while the mmproj is loaded.
    """

    def __init__(self, projector: str, encoded: ImageCache) -> None:
        self.context: Any = None
        self._projector = projector
        self._encoded = encoded
        self._digests: dict[Any, str] = {}
        self._sizes: dict[str, tuple[str, tuple[int, int]]] = {}

    def knows(self, digest: str, modality: str) -> bool:
        """Whether the size of a medium is known."""
        return self._sizes.get(digest, ("",))[0] == modality

    def size(self, digest: str) -> tuple[int, int]:
        """Return the size of a medium that is known: of a sound, its samples and 1."""
        return self._sizes[digest][1]

    def note_size(self, digest: str, part: MediaPart) -> None:
        """Remember the size of a picture, for which it is looked into."""
        remember(self._sizes, digest, ("image", part.size))

    def forget_names(self) -> None:
        """Look again what names lead to."""
        self._digests.clear()

    def of(self, part: MediaPart) -> Any:
        """Return libmtmd's bitmap of a picture or sound."""
        support = (
            mtmd_cpp.mtmd_support_vision
            if part.modality == "image"
            else mtmd_cpp.mtmd_support_audio
        )
        if not support(self.context):
            kind = "pictures" if part.modality == "image" else "sounds"
            raise UnsupportedError(f"{part.label}: {self._projector} does not take {kind}")
        if part.modality == "image":
            bitmap = self._of_picture(part)
        else:
            content = part.content
            assert isinstance(content, bytes)
            bitmap = self._of_bytes(content)
        if bitmap is None:
            raise part.error("is not one that can be read")
        if mtmd_cpp.mtmd_bitmap_is_audio(bitmap) != (part.modality == "audio"):
            mtmd_cpp.mtmd_bitmap_free(bitmap)
            raise part.error("is of the other kind: a picture given as sound or the reverse")
        return bitmap

    def _of_picture(self, part: MediaPart) -> Any:
        content = part.content
        if isinstance(content, bytes):
            try:
                as_it_is = is_jpeg_as_it_is(content)
            except PictureError as error:
                raise part.error(str(error)) from error
            if as_it_is and (bitmap := self._of_bytes(content)) is not None:
                return bitmap
        picture = part.picture()
        return mtmd_cpp.mtmd_bitmap_init(*picture.size, _address(picture.tobytes()))

    def _of_bytes(self, data: bytes) -> Any:
        assert self.context is not None
        return mtmd_cpp.mtmd_helper_bitmap_init_from_buf(
            self.context, _address(data), len(data), False
        )

    def empty(self, digest: str) -> Any:
        """Return a bitmap that has the size of a medium that was seen, and no content."""
        modality, size = self._sizes[digest]
        if modality == "audio":
            return mtmd_cpp.mtmd_bitmap_init_from_audio(size[0], None)
        return mtmd_cpp.mtmd_bitmap_init(*size, None)

    def kept(self, digest: str, part: MediaPart) -> Encoded | None:
        """Return the beginning of what a medium was encoded to, if that was kept."""
        kept = self._encoded.peek(digest, part.modality)
        if kept is not None and digest not in self._sizes:
            remember(self._sizes, digest, (kept.modality, kept.size))
        return kept

    def note(self, digest: str, bitmap: Any) -> None:
        """Remember the kind and size of a bitmap."""
        modality = "audio" if mtmd_cpp.mtmd_bitmap_is_audio(bitmap) else "image"
        size = mtmd_cpp.mtmd_bitmap_get_nx(bitmap), mtmd_cpp.mtmd_bitmap_get_ny(bitmap)
        remember(self._sizes, digest, (modality, size))

    def digest(self, part: MediaPart, is_cached: Callable[[str], bool]) -> str:
        """Return the digest of a medium, without having it where it is known.

        A file counts as known as long as its size and time of change are what they were; a URL as
        long as what it led to is in the cache.
        """
        if part.url is not None:
            source: Any = part.url
            digest = self._digests.get(source)
            if digest is not None and is_cached(digest):
                return digest
        elif part.file is not None:
            try:
                stat = part.file.stat()
            except OSError as error:
                raise part.error(f"cannot be read: {error.strerror}") from error
            source = (part.file, stat.st_size, stat.st_mtime_ns)
            if source in self._digests:
                return self._digests[source]
        else:
            return part.digest
        remember(self._digests, source, part.digest)
        return part.digest


def _address(data: bytes) -> Any:
    """Return bytes as what C reads them from; libmtmd copies what it keeps."""
    return ctypes.cast(ctypes.c_char_p(data), ctypes.POINTER(ctypes.c_uint8))


def remember(memory: dict[Any, Any], key: Any, value: Any) -> None:
    """Remember something, and forget what was remembered longest ago."""
    memory.pop(key, None)
    memory[key] = value
    while len(memory) > _REMEMBERED:
        del memory[next(iter(memory))]
