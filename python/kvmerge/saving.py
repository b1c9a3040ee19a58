r"""Write what a cache holds to a file, and read it again.

A file is::

    8 bytes   b"kvmerge\0"
    4 bytes   format version                    little-endian, as all numbers here
    4 bytes   bytes of the header
    8 bytes   bytes of the cells
    header    JSON: what was saved, and from what (`origin_of`)
    cells     llama.cpp's state of the sequence, with the engine's part
    32 bytes  SHA-256 of everything before

Everything is checked before the cache is touched.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import numpy as np
import numpy.typing as npt
from llama_cpp.llama import Llama as StockLlama

from .cache import KVCache, Snapshot
from .cache_types import CACHE_TYPES
from .errors import StateError
from .gguf_file import fingerprint
from .native.library import LLAMA_CPP_PYTHON
from .policies import Policy
from .prompt import MediaSpan
from .stats import MergeRecord
from .version import __version__

_Record = TypeVar("_Record", MediaSpan, MergeRecord)

MAGIC = b"kvmerge\0"
FORMAT_VERSION = 3

_START = struct.Struct("<8sIIQ")
_DIGEST_SIZE = hashlib.sha256().digest_size
_FROM_CONTEXT = (
    "flash_attn_type",
    "rope_scaling_type",
    "rope_freq_base",
    "rope_freq_scale",
    "yarn_ext_factor",
    "yarn_attn_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_orig_ctx",
)
"""Fields of ``llama_context_params`` that decide what keys and values are, or how they lie."""


# What a file says.


def origin_of(llm: StockLlama, policy: Policy | None) -> dict[str, Any]:
    """Return what has to be the same where a file is loaded, in the words of error messages.

    Parameters
    ----------
    llm : llama_cpp.Llama
        The model.
    policy : Policy or None
        How its cache is merged; None where it is not.
    """
    names = {number: name for name, number in CACHE_TYPES.items()}
    params, projector = llm.context_params, getattr(llm.chat_handler, "clip_model_path", None)
    return {
        "llama.cpp": LLAMA_CPP_PYTHON,
        "byte order": sys.byteorder,
        "model": fingerprint(Path(llm.model_path)),
        "mmproj": None if projector is None else fingerprint(Path(projector)),
        "LoRA": None if not llm.lora_path else fingerprint(Path(llm.lora_path)),
        "LoRA scale": llm.lora_scale,
        "type_k": names.get(params.type_k, params.type_k),
        "type_v": names.get(params.type_v, params.type_v),
        **{name: getattr(params, name) for name in _FROM_CONTEXT},
        "kv_merge": None if policy is None else str(policy),
        "policy": None if policy is None else policy.engine_params(),
    }


def _file(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(os.fsdecode(path)).expanduser()
    except (TypeError, RuntimeError) as error:
        raise StateError(f"{path!r} is no path: {error}") from error


def _shown(file: Path) -> str:
    return str(file).encode("utf-8", "backslashreplace").decode()


def _why(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


# Writing.


def save(cache: KVCache, path: str | os.PathLike[str], about: dict[str, Any]) -> None:
    """Write what a cache holds; see `Llama.save_context`.

    Parameters
    ----------
    cache : KVCache
        The cache.
    path : path
        The file.
    about : dict
        What the file says beside that: ``"origin"``, from `origin_of`, and what may interest
        somebody who looks into it.
    """
    if cache.n_tokens == 0:
        raise StateError("there is nothing to save: the cache is empty")
    snapshot = cache.snapshot(small=True)
    fields = {
        "kvmerge": __version__,
        **about,
        "tokens": snapshot.tokens.tolist(),
        "positions": snapshot.positions.tolist(),
        "media": [asdict(span) for span in snapshot.spans],
        "merges": [asdict(merge) for merge in snapshot.merges],
    }
    header = json.dumps(fields, separators=(",", ":")).encode()
    start = _START.pack(MAGIC, FORMAT_VERSION, len(header), len(snapshot.cells))
    file = _file(path)
    try:
        _write(file, [start, header, snapshot.cells])
    except (OSError, ValueError) as error:
        raise StateError(f"the context cannot be saved to {_shown(file)}: {_why(error)}") from error


def _mode(file: Path) -> int:
    """Return the mode of the file that is replaced, or of one that is new."""
    try:
        status = file.stat()
    except FileNotFoundError:
        umask = os.umask(0o077)
        os.umask(umask)
        return 0o666 & ~umask
    if not stat.S_ISREG(status.st_mode):
        raise OSError(0, "it is not a regular file")
    return stat.S_IMODE(status.st_mode)


def _write(file: Path, pieces: Iterable[bytes | bytearray]) -> None:
    """Write pieces and their SHA-256 to a file that appears complete or not at all."""
    file = Path(os.path.realpath(file))  # what a link leads to is replaced, not the link
    if file.is_dir():
        raise IsADirectoryError(0, "it is a folder")
    mode = _mode(file)
    number, name = tempfile.mkstemp(dir=file.parent, prefix=".kvmerge-", suffix=".part")
    try:
        with os.fdopen(number, "wb") as stream:
            digest = hashlib.sha256()
            for piece in pieces:
                digest.update(piece)
                stream.write(piece)
            stream.write(digest.digest())
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, mode)
        os.replace(name, file)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise
    if os.name == "posix":
        # The new name is on disk only when its folder is.
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


# Reading.


def load(
    cache: KVCache, path: str | os.PathLike[str], origin: dict[str, Any], n_vocab: int
) -> None:
    """Put a saved context into a cache; see `Llama.load_context`.

    Parameters
    ----------
    cache : KVCache
        The cache.
    path : path
        The file.
    origin : dict
        What `origin_of` returns here.
    n_vocab : int
        Tokens of the vocabulary.
    """
    file = _file(path)
    header, cells = _read(file)
    try:
        snapshot = _snapshot(header, cells, n_vocab)
        saved = dict(header["origin"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise StateError(f"{file} has a header that makes no sense: {error!r}") from error
    _check_origin(file, saved, origin, has_media=bool(snapshot.spans))
    n_ctx = len(cache.ids)
    if len(snapshot.tokens) >= n_ctx:
        raise StateError(
            f"{file} holds {len(snapshot.tokens)} tokens, and n_ctx={n_ctx} takes "
            f"{n_ctx - 1} with room for an answer: make n_ctx larger"
        )
    try:
        cache.replace(snapshot)
    except StateError as error:
        raise StateError(f"{file} is refused by llama.cpp: {error}") from error


def _read(file: Path) -> tuple[dict[str, Any], bytearray]:
    """Return header and cells of a file that is whole."""
    try:
        if not stat.S_ISREG(file.stat().st_mode) and not file.is_dir():
            raise OSError(0, "it is not a regular file")  # A pipe would have to be waited for.
        with file.open("rb") as stream:
            start = stream.read(_START.size)
            header_size, cells_size = _sizes(file, start, os.fstat(stream.fileno()).st_size)
            header = stream.read(header_size)
            cells = bytearray(cells_size)
            stream.readinto(cells)
            expected = stream.read(_DIGEST_SIZE)
    except (OSError, ValueError) as error:
        raise StateError(f"{_shown(file)} cannot be read: {_why(error)}") from error
    digest = hashlib.sha256(start)
    digest.update(header)
    digest.update(cells)
    if digest.digest() != expected:
        raise StateError(f"{file} is damaged: its SHA-256 is not the one that it was saved with")
    try:
        fields = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise StateError(f"{file} has a header that is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise StateError(f"{file} has a header that is not a JSON object")
    return fields, cells


def _sizes(file: Path, start: bytes, size: int) -> tuple[int, int]:
    """Return the sizes of header and cells that fit the size of the file."""
    if start[: len(MAGIC)] != MAGIC:
        raise StateError(
            f"{file} is not a saved context: it begins with {start[: len(MAGIC)]!r}, not {MAGIC!r}"
        )
    if len(start) < _START.size:
        raise StateError(f"{file} is cut off after {len(start)} bytes")
    _, version, header_size, cells_size = _START.unpack(start)
    if version != FORMAT_VERSION:
        age = "a newer" if version > FORMAT_VERSION else "an older"
        raise StateError(
            f"{file} has format version {version}, of {age} kvmerge: version {FORMAT_VERSION} is "
            "read"
        )
    whole = _START.size + header_size + cells_size + _DIGEST_SIZE
    if size != whole:
        raise StateError(
            f"{file} has {size} bytes where {whole} belong: it was cut off or added to"
        )
    return header_size, cells_size


def _snapshot(header: dict[str, Any], cells: bytearray, n_vocab: int) -> Snapshot:
    tokens, positions = _integers(header["tokens"]), _integers(header["positions"])
    spans = tuple(_record(MediaSpan, fields) for fields in header["media"])
    merges = tuple(_record(MergeRecord, fields) for fields in header["merges"])
    if not len(tokens) or len(positions) != len(tokens) + 1:
        raise ValueError("tokens and positions do not go together")
    if tokens.max() >= n_vocab:
        raise ValueError(f"token {tokens.max()} is not one of {n_vocab}")
    if positions[0] != 0 or (np.diff(positions) < 0).any():
        raise ValueError("positions go back")
    at = 0
    for span in spans:
        if not at <= span.start < span.end <= len(tokens):
            raise ValueError("pictures lie outside the tokens")
        if (tokens[span.start : span.end] >= 0).any():
            raise ValueError("a picture has tokens of text")
        at = span.end
    return Snapshot(tokens, positions, spans, merges, cells, is_small=True)


def _integers(values: Any) -> npt.NDArray[np.int32]:
    """Return a list of integers as an array; NumPy alone would take text and fractions too."""
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise TypeError("not a list of integers")
    return np.array(values, np.int32)


def _record(kind: type[_Record], fields: Any) -> _Record:
    """Make a record of fields that have the types it declares."""
    for name, declared in get_type_hints(kind).items():
        if not isinstance(fields[name], declared) or isinstance(fields[name], bool):
            raise TypeError(f"{name} is {fields[name]!r}")
    return kind(**fields)


def _check_origin(
    file: Path, saved: dict[str, Any], here: dict[str, Any], *, has_media: bool
) -> None:
    """Check that a file comes from what it is loaded into."""
    if not has_media:
        # What pictures would have been encoded with does not matter then.
        saved, here = {**saved, "mmproj": None}, {**here, "mmproj": None}
    for name, value in here.items():
        found = saved.get(name)
        if found == value:
            continue
        if name in ("model", "mmproj", "LoRA"):
            raise StateError(f"{file} was saved with another {name} file than the one loaded here")
        raise StateError(f"{file} was saved with {name}={found!r}, here it is {value!r}")
