"""A look at a GGUF file before llama.cpp is asked to load it."""

from __future__ import annotations

import hashlib
import os
import struct
from functools import lru_cache
from pathlib import Path

from .errors import KVMergeError

_HEADER_SIZE = 24
_BEGINNING = 16 * 1024 * 1024
_BLOCKS = 1024
_BLOCK_SIZE = 4096


def check_gguf(path: object, what: str, error: type[KVMergeError]) -> Path:
    """Return the path of a file that begins like a GGUF.

    Parameters
    ----------
    path : path
        The file.
    what : str
        What it is for the user, such as ``"model"``.
    error : type
        Exception to raise.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise error(f"the {what} must be the path of a GGUF file, not {path!r}")
    file = Path(os.fsdecode(path)).expanduser()
    if not file.exists():
        raise error(f"the {what} {file} does not exist")
    if file.is_dir():
        raise error(f"the {what} {file} is a folder, not a GGUF file")
    try:
        with file.open("rb") as stream:
            header = stream.read(_HEADER_SIZE)
    except OSError as cause:
        raise error(f"the {what} {file} cannot be read: {cause.strerror}") from cause
    if header[:4] != b"GGUF":
        raise error(
            f"the {what} {file} is not a GGUF file: it begins with {header[:4]!r}, not b'GGUF'"
        )
    if len(header) < _HEADER_SIZE:
        raise error(f"the {what} {file} is cut off after {len(header)} bytes")
    version = struct.unpack_from("<I", header, 4)[0]
    if not 2 <= version <= 3:
        raise error(f"the {what} {file} has GGUF version {version}: versions 2 and 3 are read")
    return file


def fingerprint(file: Path) -> str:
    """Return a SHA-256 that tells one model from another, without reading all of it.

    It is taken over the size, the beginning, where metadata and the list of tensors are, and
    blocks of weights from all over the file.
    """
    status = file.stat()
    return _fingerprint(file, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=16)
def _fingerprint(file: Path, size: int, changed: int) -> str:
    digest = hashlib.sha256(struct.pack("<Q", size))
    with file.open("rb") as stream:
        digest.update(stream.read(_BEGINNING))
        for i in range(_BLOCKS):
            stream.seek(i * size // _BLOCKS)
            digest.update(stream.read(_BLOCK_SIZE))
    return digest.hexdigest()


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of all bytes of a file, in hex."""
    status = file.stat()
    return _sha256_of(file, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=16)
def _sha256_of(file: Path, size: int, changed: int) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1024 * 1024):
            digest.update(piece)
    return digest.hexdigest()
