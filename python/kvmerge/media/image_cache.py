r"""Encoded pictures and sounds, kept so that what is seen again is neither decoded nor encoded.

They are kept as they come from the encoder, 32-bit floats, so that an answer is the same bit for
bit whether they were found or encoded.  A folder holds one file for each picture, or each slice of
one::

    8 bytes   b"kvimage\0"
    4 bytes   format version                    little-endian, as all numbers here
    4 bytes   bytes of the header
    header    JSON: modality, width and height of the picture, shape of the embeddings
    cells     embeddings, 32-bit floats
    32 bytes  SHA-256 of everything before
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..byte_size import MIB, parse_bytes
from ..errors import OptionError

log = logging.getLogger("kvmerge")

MAGIC = b"kvimage\0"
FORMAT_VERSION = 1
SUFFIX = ".kvimage"

_START = struct.Struct("<8sII")
_DIGEST_SIZE = hashlib.sha256().digest_size
_LARGEST_HEADER = 1 << 16
_FLOAT = np.dtype("<f4")

Name = tuple[str, int]
"""SHA-256 of the file's bytes in hex, and the number of the slice."""


class _DamagedError(Exception):
    """Why a file of the folder is not used."""


@dataclass(frozen=True)
class Encoded:
    """A picture (or a slice of one) or a sound, as the language model reads it.

    Attributes
    ----------
    modality : str
        ``"image"`` or ``"audio"``.
    size : tuple of int
        Width and height of the whole picture in pixels; samples and 1 of a sound.
    embeddings : array
        Float32, [n_tokens, n_embd].
    """

    modality: str
    size: tuple[int, int]
    embeddings: npt.NDArray[np.float32]

    @property
    def n_bytes(self) -> int:
        """Bytes of the embeddings."""
        return self.embeddings.nbytes


@dataclass(frozen=True)
class ImageCacheStats:
    """What became of the pictures and sounds that had to be read, slices of them counted each.

    Attributes
    ----------
    found : int
        Those that were there already.
    found_in_folder : int
        Those among them that came from a file.
    encoded : int
        Those that were not there.
    damaged : int
        Files of the folder that were not what had been written.
    held : int
        Those that are in memory now.
    mib : float
        MiB that they take.
    """

    found: int = 0
    found_in_folder: int = 0
    encoded: int = 0
    damaged: int = 0
    held: int = 0
    mib: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.found} found ({self.found_in_folder} in the folder), {self.encoded} encoded, "
            f"{self.held} held in {self.mib:.2f} MiB"
        )


def bytes_of(value: object) -> int:
    """Return the bytes that ``image_cache=`` means.

    Raises
    ------
    OptionError
        If it means none.
    """
    if value is None:
        return 0
    if isinstance(value, str):
        with suppress(OptionError):
            return parse_bytes("image_cache", value)
    elif isinstance(value, Integral) and not isinstance(value, (bool, np.bool_)) and value >= 0:
        return int(value)
    shown = repr(value)
    raise OptionError(
        f"image_cache={shown if len(shown) <= 80 else shown[:77] + '...'}: image_cache must be a "
        'text with bytes such as "256MiB", a whole number of bytes, or None for no cache'
    )


def _folder_of(value: object) -> Path | None:
    if value is None:
        return None
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise OptionError(f"image_cache_dir={value!r}: image_cache_dir must be a folder, or None")
    folder = Path(os.fsdecode(value)).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(
            f"image_cache_dir={str(folder)!r} cannot be used as a folder: {reason}"
        ) from error
    return folder


class ImageCache:
    """Encoded pictures and sounds, in memory and, if there is one, in a folder.

    Parameters
    ----------
    limit : int or str or None
        What they may take in memory, such as ``"256MiB"``; with 0 or None none is kept there.  What
        was used least recently goes first.
    folder : path or None
        Folder in which they are kept as well, which several processes may use at a time.  Nothing
        is ever removed from it.

    Raises
    ------
    OptionError
        If one of them is something else.
    """

    def __init__(self, limit: object, folder: object = None) -> None:
        self._limit = bytes_of(limit)
        self._folder = _folder_of(folder)
        self._origin: Callable[[], Mapping[str, Any]] = dict
        self._origin_digest: bytes | None = None
        self._memory: OrderedDict[Name, Encoded] = OrderedDict()
        self._n_bytes = 0
        self._needed: frozenset[str] = frozenset()
        self._from_folder: set[Name] = set()  # and not used yet
        self._can_write = True
        self._found = self._found_in_folder = self._encoded = self._damaged = 0

    @property
    def keeps(self) -> bool:
        """Whether anything is kept anywhere."""
        return self._limit > 0 or self._folder is not None

    def set_origin(self, origin: Callable[[], Mapping[str, Any]]) -> None:
        """Say what encodes.

        Parameters
        ----------
        origin : callable
            Returns what embeddings depend on beside the picture, for names of files; it is asked
            when the folder is first used.
        """
        self._origin = origin

    def stats(self) -> ImageCacheStats:
        """Return counts since the cache was made."""
        return ImageCacheStats(
            self._found,
            self._found_in_folder,
            self._encoded,
            self._damaged,
            len(self._memory),
            self._n_bytes / MIB,
        )

    # Using it.

    @contextmanager
    def reserving(self, digests: Iterable[str]) -> Iterator[None]:
        """Remove nothing of these pictures until the end of the block, in which they are read.

        Without that a conversation with more pictures than have room would find none of them, since
        each new one would push out the one that is needed next.
        """
        before, self._needed = self._needed, frozenset(digests)
        try:
            yield
        finally:
            self._needed = before

    def peek(self, digest: str, modality: str) -> Encoded | None:
        """Return the first slice of a picture, if it is here; this counts as no use of it."""
        found = self._get((digest, 0))
        return found if found is not None and found.modality == modality else None

    def get(self, name: Name, n_tokens: int) -> npt.NDArray[np.float32] | None:
        """Return embeddings, [n_tokens, n_embd], if they are here."""
        found = self._get(name)
        # Of one model a picture has as many tokens everywhere, but for padding at its beginning.
        if found is None or len(found.embeddings) != n_tokens:
            return None
        self._found += 1
        self._found_in_folder += name in self._from_folder
        self._from_folder.discard(name)
        return found.embeddings

    def put(self, name: Name, encoded: Encoded) -> None:
        """Keep what was encoded."""
        self._encoded += 1
        if not self.keeps:
            return
        encoded.embeddings.flags.writeable = False
        self._keep(name, encoded)
        self._write(name, encoded)

    def _get(self, name: Name) -> Encoded | None:
        found = self._memory.get(name)
        if found is not None:
            self._memory.move_to_end(name)
            return found
        found = self._read(name)
        if found is not None:
            self._from_folder.add(name)
            self._keep(name, found)
        return found

    # Memory.

    def _keep(self, name: Name, encoded: Encoded) -> None:
        self._drop(name)
        for other in [other for other in self._memory if other[0] not in self._needed]:
            if self._n_bytes + encoded.n_bytes <= self._limit:
                break
            self._drop(other)
        if self._n_bytes + encoded.n_bytes <= self._limit:
            self._memory[name] = encoded
            self._n_bytes += encoded.n_bytes

    def _drop(self, name: Name) -> None:
        encoded = self._memory.pop(name, None)
        if encoded is not None:
            self._n_bytes -= encoded.n_bytes

    # The folder.

    def _file(self, name: Name) -> Path:
        assert self._folder is not None
        if self._origin_digest is None:
            origin = json.dumps(self._origin(), sort_keys=True).encode()
            self._origin_digest = hashlib.sha256(origin).digest()
        digest, number = name
        key = hashlib.sha256(self._origin_digest + f"{digest}/{number}".encode()).hexdigest()
        return self._folder / (key + SUFFIX)

    def _write(self, name: Name, encoded: Encoded) -> None:
        if self._folder is None or not self._can_write:
            return
        file = self._file(name)
        part = file.with_name(f".{file.stem}-{secrets.token_hex(8)}.part")
        try:
            try:
                with part.open("xb") as stream:
                    for piece in _sealed(encoded):
                        stream.write(piece)
                part.replace(file)
            finally:
                with suppress(OSError):
                    part.unlink()
        except OSError as error:
            self._can_write = False
            log.warning(
                "encoded pictures are no longer written to %s: %s", self._folder, error.strerror
            )

    def _read(self, name: Name) -> Encoded | None:
        if self._folder is None:
            return None
        file = self._file(name)
        try:
            return _unsealed(file.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, _DamagedError) as error:
            self._damaged += 1
            log.warning("%s is not used, the picture is encoded anew: it %s", file, error)
            return None


def _sealed(encoded: Encoded) -> Iterator[bytes]:
    """Return the pieces of a file."""
    values = np.ascontiguousarray(encoded.embeddings, _FLOAT)
    fields = {"modality": encoded.modality, "size": encoded.size, "shape": values.shape}
    header = json.dumps(fields).encode()
    digest = hashlib.sha256()
    start = _START.pack(MAGIC, FORMAT_VERSION, len(header))
    for piece in (start, header, values.tobytes()):
        digest.update(piece)
        yield piece
    yield digest.digest()


def _unsealed(data: bytes) -> Encoded:
    """Return what a file holds; it may be anybody's."""
    if len(data) < _START.size + _DIGEST_SIZE:
        raise _DamagedError(f"ends after {len(data)} bytes")
    magic, version, header_size = _START.unpack_from(data)
    if magic != MAGIC:
        raise _DamagedError("is no encoded picture")
    if version != FORMAT_VERSION:
        raise _DamagedError(f"has format version {version}, not {FORMAT_VERSION}")
    if hashlib.sha256(data[:-_DIGEST_SIZE]).digest() != data[-_DIGEST_SIZE:]:
        raise _DamagedError("is damaged: its SHA-256 is not the one that it was written with")
    at = _START.size + header_size
    values = data[at:-_DIGEST_SIZE]
    try:
        if header_size > _LARGEST_HEADER:
            raise ValueError(f"a header of {header_size} bytes")
        fields = json.loads(data[_START.size : at])
        modality = fields["modality"]
        width, height = (_count(value) for value in fields["size"])
        n_tokens, n_embd = (_count(value) for value in fields["shape"])
        if modality not in ("image", "audio"):
            raise ValueError(f"modality {modality!r}")
        if n_tokens * n_embd * _FLOAT.itemsize != len(values):
            raise ValueError(f"{n_tokens}x{n_embd} numbers in {len(values)} bytes")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _DamagedError(f"has a header that makes no sense: {error!r}") from error
    embeddings = np.frombuffer(values, _FLOAT).astype(np.float32).reshape(n_tokens, n_embd)
    embeddings.flags.writeable = False
    return Encoded(modality, (width, height), embeddings)


def _count(value: Any) -> int:
    if type(value) is not int or not 1 <= value < 2**31:
        raise ValueError(f"{value!r} is not a number of something")
    return value
