"""A look at a GGUF file before llama.cpp is asked to load it."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from .errors import KVMergeError

_HEADER_SIZE = 24


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
