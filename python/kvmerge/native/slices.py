"""What the vision encoder gets of a slice of a picture (``cpp/mtmd/kvmerge-slice.h``)."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .library import library_file


def slice_pixels(chunk: Any) -> npt.NDArray[np.float32] | None:
    """Return the pixels of a picture or slice, without a copy, or None where they do not say all.

    Parameters
    ----------
    chunk : pointer
        The chunk of libmtmd, with its content; the pixels are valid as long as it is.
    """
    data = ctypes.POINTER(ctypes.c_float)()
    n = _function()(chunk, ctypes.byref(data))
    return np.ctypeslib.as_array(data, (n,)) if n > 0 else None


@cache
def _function() -> Any:
    function = ctypes.CDLL(str(library_file("mtmd"))).kvmerge_slice_pixels
    function.restype = ctypes.c_int64
    function.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.POINTER(ctypes.c_float))]
    return function
