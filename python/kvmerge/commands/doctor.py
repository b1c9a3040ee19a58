"""``kvmerge doctor``: which libraries and devices are used, and whether they can merge."""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path
from types import ModuleType

from ..native import library, loading, python_layer
from ..version import __version__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command: none."""


def _loaded_backends() -> list[str]:
    """Return the files of ggml back ends that this process has loaded, where the system tells."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    files = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "/" in line}
    names = {Path(file).name for file in files}
    return sorted(
        name for name in names if name.startswith("libggml-") and name != "libggml-base.so"
    )


def _whose_layer(llama_cpp: ModuleType) -> str:
    """Say which Python layer is in use, and which one is passed over."""
    used = Path(llama_cpp.__file__ or "").parent
    other = python_layer.installed()
    if used != python_layer.CARRIED:
        return f"installed: {used}"
    if other is None or other.resolve() == used.resolve():
        return "the package's own copy"
    version = python_layer.stated_version(other)
    return f"the package's own copy; {version} in {other} is not used"


def run(arguments: argparse.Namespace) -> int:
    """Print what is found; a `LibraryError` says what is wrong."""
    folder = library.library_folder()
    print(f"kvmerge            {__version__}")
    print(f"Python             {platform.python_version()} ({sys.executable})")
    print(f"libraries          {folder}")
    llama_cpp = loading.load()
    from ..native import backends, binding
    from ..policies import presets

    print(f"llama-cpp-python   {llama_cpp.__version__} ({_whose_layer(llama_cpp)})")
    print(f"patched            yes, kvmerge API {binding.api_version()}")
    print(f"kv_merge=          {', '.join(presets())}")
    registered = _loaded_backends()
    if registered:
        print(f"backends loaded    {', '.join(registered)}")
    for package in backends.packages():
        print(f"back-end package   {package}")
    for device in backends.devices():
        free, total = device.free >> 20, device.total >> 20
        print(f"device             {device} ({free} of {total} MiB free)")
    used, unused = backends.in_use(0)
    print(f"used by default    {used}")
    if unused:
        print(f"faster, unused     {unused}: n_gpu_layers=-1 uses it")
    if hardware := backends.unserved_hardware():
        print(f"faster, unused     {hardware} would use it (docs/building.md)")
    print(f"CPU features       {llama_cpp.llama_print_system_info().decode().strip()}")
    return 0
