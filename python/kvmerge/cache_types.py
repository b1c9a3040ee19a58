"""Types that keys and values may have in the cache."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral

from .errors import OptionError, did_you_mean
from .native.backends import library

CACHE_TYPES = {
    "f32": 0,
    "f16": 1,
    "bf16": 30,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "iq4_nl": 20,
}
"""Names that ``type_k`` and ``type_v`` accept, with their ``ggml_type``."""

UNQUANTIZED = frozenset(CACHE_TYPES[name] for name in ("f32", "f16", "bf16"))
"""Those that need no flash attention for V."""


def cache_type(option: str, value: object) -> int | None:
    """Return the ``ggml_type`` that a name or number means; None stays None.

    Raises
    ------
    OptionError
        If it is no type of a cache.
    """
    if value is None:
        return None
    if isinstance(value, str) and value.lower() in CACHE_TYPES:
        return CACHE_TYPES[value.lower()]
    if (
        isinstance(value, Integral)
        and not isinstance(value, bool)
        and int(value) in CACHE_TYPES.values()
    ):
        return int(value)
    names = ", ".join(repr(name) for name in CACHE_TYPES)
    raise OptionError(
        f"{option}={value!r} is not a cache type: it must be one of {names}, or the matching "
        f"llama_cpp.GGML_TYPE_* number.{did_you_mean(value, CACHE_TYPES)}"
    )


def bytes_per_cell(metadata: Mapping[str, str], type_k: int, type_v: int) -> int:
    """Return the bytes of K and V of a cell over all layers; 0 where layers differ.

    Parameters
    ----------
    metadata : mapping
        What the GGUF says of the model.
    type_k, type_v : int
        ``ggml_type`` of K and of V.
    """
    arch = metadata.get("general.architecture", "")
    try:
        heads = int(metadata[f"{arch}.attention.head_count"])
        heads_kv = int(metadata.get(f"{arch}.attention.head_count_kv", heads))
        layers = int(metadata[f"{arch}.block_count"])
        size = int(metadata[f"{arch}.embedding_length"]) // heads
        size_k = int(metadata.get(f"{arch}.attention.key_length", size))
        size_v = int(metadata.get(f"{arch}.attention.value_length", size))
    except (KeyError, ValueError, ZeroDivisionError):
        return 0
    return layers * (_row_size(type_k, heads_kv * size_k) + _row_size(type_v, heads_kv * size_v))


def _row_size(ggml_type: int, n: int) -> int:
    ggml = library()
    return int(n // ggml.ggml_blck_size(ggml_type) * ggml.ggml_type_size(ggml_type))
