"""``kvmerge doctor``: which libraries and devices are used, and whether they can merge."""

from __future__ import annotations

import argparse
import ctypes
import platform
import sys
from pathlib import Path

from .. import __version__, _library


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command: none."""


def _loaded_backends(folder: Path) -> list[str]:
    """Return the ggml backend files that this process has loaded, where the system tells."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    prefix = f"{folder.resolve()}/libggml-"
    files = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "/" in line}
    names = {Path(file).name for file in files if file.startswith(prefix)}
    return sorted(names - {"libggml-base.so"})


def _devices() -> list[str]:
    ggml = ctypes.CDLL(str(_library.library_file("ggml")))
    base = ctypes.CDLL(str(_library.library_file("ggml-base")))
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    ggml.ggml_backend_dev_get.restype = ctypes.c_void_p
    ggml.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    for name in ("ggml_backend_dev_name", "ggml_backend_dev_description"):
        function = getattr(base, name)
        function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    base.ggml_backend_dev_memory.argtypes = [
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_size_t),
        ctypes.POINTER(ctypes.c_size_t),
    ]
    lines = []
    for i in range(ggml.ggml_backend_dev_count()):
        device = ggml.ggml_backend_dev_get(i)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        base.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        name = base.ggml_backend_dev_name(device).decode()
        description = base.ggml_backend_dev_description(device).decode()
        memory = f"{free.value >> 20} of {total.value >> 20} MiB free"
        lines.append(f"{name}: {description} ({memory})")
    return lines


def run(arguments: argparse.Namespace) -> int:
    """Print what is found; a `LibraryError` says what is wrong."""
    folder = _library.library_folder()
    print(f"kvmerge            {__version__}")
    print(f"Python             {platform.python_version()} ({sys.executable})")
    print(f"libraries          {folder}")
    llama_cpp = _library.load()
    from .. import _binding
    from ..policies import presets

    print(f"llama-cpp-python   {llama_cpp.__version__}")
    print(f"patched            yes, kvmerge API {_binding.api_version()}")
    print(f"kv_merge=          {', '.join(presets())}")
    backends = _loaded_backends(folder)
    if backends:
        print(f"backends loaded    {', '.join(backends)}")
    for line in _devices():
        print(f"device             {line}")
    print(f"CPU features       {llama_cpp.llama_print_system_info().decode().strip()}")
    return 0
