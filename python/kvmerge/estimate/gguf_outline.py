"""A GGUF that says of itself what another one does, and has next to no weights."""

from __future__ import annotations

import ctypes
import os
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import KVMergeError
from ..native.library import library_file
from ..native.log import caught

_F32 = 0  # ggml_type
_LARGEST_ALIGNMENT = 4096  # of a tensor in a file
_STRING = 8  # gguf_type
# libmtmd takes the size of the embedding from an axis of the projection: for these from the one
# that an outline drops elsewhere, so they are kept as they are.
_WHOLE = ("mm.input_projection.weight", "resampler.proj.weight")


class _GgmlParams(ctypes.Structure):
    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


class _GgufParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


@lru_cache(maxsize=1)
def _ggml() -> Any:
    """Return ggml with the functions that are used here declared."""
    library = ctypes.CDLL(str(library_file("ggml-base")))
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64
    for name, result, arguments in (
        ("ggml_tensor_overhead", ctypes.c_size_t, []),
        ("ggml_graph_overhead_custom", ctypes.c_size_t, [ctypes.c_size_t, ctypes.c_bool]),
        ("ggml_init", pointer, [_GgmlParams]),
        ("ggml_free", None, [pointer]),
        (
            "ggml_new_tensor",
            pointer,
            [pointer, ctypes.c_int, ctypes.c_int, ctypes.POINTER(number)],
        ),
        ("ggml_set_name", pointer, [pointer, text]),
        ("gguf_init_empty", pointer, []),
        ("gguf_init_from_file", pointer, [text, _GgufParams]),
        ("gguf_free", None, [pointer]),
        ("gguf_find_key", number, [pointer, text]),
        ("gguf_get_kv_type", ctypes.c_int, [pointer, number]),
        ("gguf_get_val_str", text, [pointer, number]),
        ("gguf_get_n_tensors", number, [pointer]),
        ("gguf_get_tensor_name", text, [pointer, number]),
        ("gguf_get_tensor_type", ctypes.c_int, [pointer, number]),
        ("gguf_get_tensor_ne", ctypes.POINTER(number), [pointer, number]),
        ("gguf_get_tensor_size", ctypes.c_size_t, [pointer, number]),
        ("gguf_get_tensor_offset", ctypes.c_size_t, [pointer, number]),
        ("gguf_set_kv", None, [pointer, pointer]),
        ("gguf_add_tensor", None, [pointer, pointer]),
        ("gguf_write_to_file", ctypes.c_bool, [pointer, text, ctypes.c_bool]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def graph_bytes(nodes: int) -> int:
    """Return the bytes of the description of a graph of up to so many nodes."""
    ggml = _ggml()
    return nodes * int(ggml.ggml_tensor_overhead()) + int(
        ggml.ggml_graph_overhead_custom(nodes, False)
    )


class GgufHeader:
    """Metadata and the list of tensors of a GGUF, without their data.

    Parameters
    ----------
    file : Path
        The file.
    what : str
        What it is for the user, such as ``"mmproj"``.
    error : type
        Exception to raise if it cannot be read.
    """

    def __init__(self, file: Path, what: str, error: type[KVMergeError]) -> None:
        self._library = _ggml()
        with caught(quiet=True) as errors:
            self._pointer = self._library.gguf_init_from_file(
                os.fsencode(file), _GgufParams(no_alloc=True, ctx=None)
            )
        if not self._pointer:
            raise error(f"the {what} {file} cannot be read: {errors.reason or 'it is damaged'}")

    def __enter__(self) -> GgufHeader:
        return self

    def __exit__(self, *_: object) -> None:
        self._library.gguf_free(self._pointer)

    @property
    def tensors(self) -> dict[str, int]:
        """Name and bytes of each tensor."""
        ggml = self._library
        return {
            ggml.gguf_get_tensor_name(self._pointer, i).decode(): int(
                ggml.gguf_get_tensor_size(self._pointer, i)
            )
            for i in range(ggml.gguf_get_n_tensors(self._pointer))
        }

    @property
    def weights(self) -> int:
        """Bytes of all tensors."""
        return sum(self.tensors.values())

    @property
    def widest(self) -> int:
        """Values in the longest row of a matrix."""
        ggml = self._library
        shapes = (
            ggml.gguf_get_tensor_ne(self._pointer, i)
            for i in range(ggml.gguf_get_n_tensors(self._pointer))
        )
        return max((int(shape[0]) for shape in shapes if shape[1] > 1), default=0)

    def text(self, key: str) -> str:
        """Return a text of the metadata; empty if there is none."""
        ggml = self._library
        index = ggml.gguf_find_key(self._pointer, key.encode())
        if index < 0 or ggml.gguf_get_kv_type(self._pointer, index) != _STRING:
            return ""
        return str(ggml.gguf_get_val_str(self._pointer, index).decode("utf-8", "replace"))

    def write_outline(self, file: Path) -> None:
        """Write a file of the same metadata and tensors of the same names, cut down to zeros.

        The first axis of every matrix has one element instead of hundreds, so that loading it
        costs nothing; what libmtmd reads off the other axes stays true.
        """
        ggml = self._library
        n_tensors = ggml.gguf_get_n_tensors(self._pointer)
        with ExitStack() as stack:
            outline = ggml.gguf_init_empty()
            stack.callback(ggml.gguf_free, outline)
            memory = _GgmlParams((n_tensors + 1) * ggml.ggml_tensor_overhead(), None, True)
            tensors = ggml.ggml_init(memory)
            stack.callback(ggml.ggml_free, tensors)
            ggml.gguf_set_kv(outline, self._pointer)
            for i in range(n_tensors):
                name = ggml.gguf_get_tensor_name(self._pointer, i)
                shape = list(ggml.gguf_get_tensor_ne(self._pointer, i)[:4])
                kind = ggml.gguf_get_tensor_type(self._pointer, i)
                if name.decode() not in _WHOLE:
                    kind = _F32
                    if max(shape[1:]) > 1:
                        shape[0] = 1
                tensor = ggml.ggml_new_tensor(tensors, kind, 4, (ctypes.c_int64 * 4)(*shape))
                ggml.ggml_set_name(tensor, name)
                ggml.gguf_add_tensor(outline, tensor)
            if not ggml.gguf_write_to_file(outline, os.fsencode(file), True):
                raise OSError(f"{file} cannot be written")
            if n_tensors:
                # Where nothing was written, a file reads as zeros.
                last = n_tensors - 1
                end = ggml.gguf_get_tensor_offset(outline, last)
                end += ggml.gguf_get_tensor_size(outline, last)
                os.truncate(file, file.stat().st_size + end + _LARGEST_ALIGNMENT)
