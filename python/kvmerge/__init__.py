"""A KV cache that merges instead of growing, for llama-cpp-python.

>>> from kvmerge import Llama
>>> llm = Llama("model.gguf", mmproj="mmproj.gguf", n_ctx=8192, kv_merge="auto", kv_budget=0.2)

`Llama` is a `llama_cpp.Llama`, and everything of that keeps working.  Import this package before
``llama_cpp``: both have to use the libraries that come with this one.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .native import loading
from .version import __version__ as __version__

loading.prepare()

if TYPE_CHECKING:
    from .errors import KVMergeError
    from .llama import Llama
    from .media.access import MediaAccess
    from .policies import (
        D2O,
        H2O,
        MEDA,
        Auto,
        Evict,
        FlowMM,
        KVMerger,
        LookM,
        MadaKV,
        Mosaic,
        Policy,
        Pyramid,
        SnapKV,
        Streaming,
        presets,
    )
    from .stats import KVStats

__all__ = [
    "D2O",
    "H2O",
    "MEDA",
    "Auto",
    "Evict",
    "FlowMM",
    "KVMergeError",
    "KVMerger",
    "KVStats",
    "Llama",
    "LookM",
    "MadaKV",
    "MediaAccess",
    "Mosaic",
    "Policy",
    "Pyramid",
    "SnapKV",
    "Streaming",
    "presets",
]

_ELSEWHERE = {
    "KVMergeError": ".errors",
    "KVStats": ".stats",
    "Llama": ".llama",
    "MediaAccess": ".media.access",
}
"""Where names are that are not of the policies."""


def __getattr__(name: str) -> Any:
    # Loading the native library takes a while, so it waits until something needs it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_ELSEWHERE.get(name, ".policies"), __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
