"""Point llama_cpp at the native libraries, import it, and check that they fit.

llama_cpp loads its libraries when it is first imported, from the folders that two environment
variables name.  `prepare` sets those and has to run before that import, which loads the backends
as well; `load` does the import and checks versions and struct layouts.
"""

from __future__ import annotations

import atexit
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import LibraryError
from . import python_layer
from .library import BUILD_AGAIN, LLAMA_CPP_PYTHON, library_file, library_folder

_PATH_VARIABLES = ("LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB")


def _loaded_folder(llama_cpp: ModuleType) -> Path:
    """Return the folder that an imported llama_cpp has loaded its library from."""
    native = sys.modules.get("llama_cpp.llama_cpp", llama_cpp)
    return Path(getattr(native, "_base_path", Path(llama_cpp.__file__ or "").parent / "lib"))


def _check_folder(llama_cpp: ModuleType) -> None:
    loaded = _loaded_folder(llama_cpp)
    if loaded.resolve() != library_folder().resolve():
        raise LibraryError(
            f"llama_cpp was imported before kvmerge and has loaded the libraries in {loaded}, "
            "which cannot merge. Put `import kvmerge` before the first `import llama_cpp` "
            "(also before libraries that import it)."
        )


def prepare() -> None:
    """Point the coming import of llama_cpp at our libraries, and at the Python layer that fits.

    Raises
    ------
    LibraryError
        If llama_cpp was already imported with other libraries.
    """
    loaded = sys.modules.get("llama_cpp")
    if loaded is not None:
        _check_folder(loaded)
        return
    for variable in _PATH_VARIABLES:
        os.environ[variable] = str(library_folder())
    python_layer.install(LLAMA_CPP_PYTHON, _loading)


@contextmanager
def _loading() -> Iterator[None]:
    """Check that the libraries are there, and load the backends after llama_cpp has loaded them.

    Whoever imports llama_cpp after this package gets libraries that are ready, also without
    `load`.
    """
    for name in ("llama", "mtmd", "ggml"):
        library_file(name)
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise LibraryError(f"{error}: {BUILD_AGAIN}") from error
    _load_backends()
    # It sends the process's own standard output to /dev/null and back around native calls, which
    # two threads do to each other for good.  What the libraries say comes through their log.
    muted = importlib.import_module("llama_cpp._utils")
    muted.suppress_stdout_stderr.__enter__ = lambda self: self
    muted.suppress_stdout_stderr.__exit__ = lambda self, *error: None
    # Two files on /dev/null that llama_cpp opens: left open, Python ends with a ResourceWarning.
    for file in (muted.outnull_file, muted.errnull_file):
        atexit.register(file.close)


def _load_backends() -> None:
    # Imported when llama_cpp is: `import kvmerge` alone takes no time.
    from . import backends

    backends.load()


def _check_version(llama_cpp: ModuleType) -> None:
    if llama_cpp.__version__ != LLAMA_CPP_PYTHON:
        raise LibraryError(
            f"kvmerge was built for llama-cpp-python {LLAMA_CPP_PYTHON}, but llama_cpp of version "
            f"{llama_cpp.__version__} was imported from {Path(llama_cpp.__file__ or '').parent}: "
            "the two would disagree about struct layouts. Put `import kvmerge` before the first "
            "`import llama_cpp`."
        )


def _check_layout(what: str, params: Any, expected: dict[str, object]) -> None:
    """Check that the default values of a struct arrive in the fields they belong to.

    The fields are those at the end and around every change of type: a field that was added,
    dropped or resized anywhere shifts at least one of them.
    """
    for name, value in expected.items():
        found = getattr(params, name)
        if found != value:
            raise LibraryError(
                f"{what}.{name} is {found!r} where {value!r} was expected: the library in "
                f"{library_folder()} and llama-cpp-python {LLAMA_CPP_PYTHON} disagree about the "
                f"layout of {what}; {BUILD_AGAIN}"
            )


def _check_layouts(llama_cpp: Any, mtmd_cpp: Any) -> None:
    _check_layout(
        "llama_context_params",
        llama_cpp.llama_context_default_params(),
        {
            "n_ctx": 512,
            "n_outputs_max_per_seq": 1,
            "yarn_ext_factor": -1.0,
            "defrag_thold": -1.0,
            "type_k": llama_cpp.GGML_TYPE_F16,
            "type_v": llama_cpp.GGML_TYPE_F16,
            "embeddings": False,
            "offload_kqv": True,
            "no_perf": True,
            "op_offload": True,
            "swa_full": True,
            "kv_unified": False,
            "n_samplers": 0,
            "ctx_other": None,
        },
    )
    _check_layout(
        "mtmd_context_params",
        mtmd_cpp.mtmd_context_params_default(),
        {
            "use_gpu": True,
            "n_threads": 4,
            "media_marker": mtmd_cpp.mtmd_default_marker(),
            "warmup": True,
            "image_min_tokens": -1,
            "image_max_tokens": -1,
            "batch_max_tokens": 1024,
            "progress_callback_user_data": None,
        },
    )


@lru_cache(maxsize=1)
def load() -> ModuleType:
    """Import llama_cpp with our libraries, checked, and return it.

    Raises
    ------
    LibraryError
        If anything does not fit; the message says what and what to do.
    """
    prepare()
    try:
        llama_cpp = importlib.import_module("llama_cpp")
    except ModuleNotFoundError as error:
        raise LibraryError(
            f"llama_cpp cannot be imported ({error}): {BUILD_AGAIN}; the Python layer belongs "
            f"into {python_layer.CARRIED}, and what it imports is among the package's dependencies"
        ) from error
    _check_folder(llama_cpp)
    _check_version(llama_cpp)

    mtmd_cpp = importlib.import_module("llama_cpp.mtmd_cpp")
    _load_backends()  # of a llama_cpp that was imported first
    _check_layouts(llama_cpp, mtmd_cpp)

    from . import binding

    binding.check()
    return llama_cpp
