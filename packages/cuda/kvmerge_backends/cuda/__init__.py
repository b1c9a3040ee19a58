"""ggml's CUDA back end; kvmerge imports this, then loads the module in this folder.

The module needs CUDA's runtime and cuBLAS, which come as packages of their own and are not on the
system's search path: they are loaded here, by their files.
"""

import ctypes
import importlib.util
import sys
from pathlib import Path

__version__ = "0.1.0"

_LIBRARIES = (
    # In the order in which they need each other.
    ("libcudart.so.*", "cudart64_*.dll"),
    ("libcublasLt.so.*", "cublasLt64_*.dll"),
    ("libcublas.so.*", "cublas64_*.dll"),
)


def _preload() -> None:
    spec = importlib.util.find_spec("nvidia")
    places = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
    for linux, windows in _LIBRARIES:
        pattern = windows if sys.platform == "win32" else linux
        files = sorted(file for place in places for file in place.rglob(pattern))
        if files:
            ctypes.CDLL(str(files[0]), mode=ctypes.RTLD_GLOBAL)


_preload()
