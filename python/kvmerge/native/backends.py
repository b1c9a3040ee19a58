"""The ggml back ends: which modules are loaded, and which devices they bring.

Modules lie in the folder of the libraries, and in packages of their own, one each: a folder
``kvmerge_backends/NAME`` anywhere on Python's path, whose ``__init__.py`` states the version of
kvmerge that the module was built for and may load what the module needs.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import LibraryError
from ..version import __version__
from . import rpc
from .library import BUILD_AGAIN, library_file, library_folder
from .python_layer import stated_version

log = logging.getLogger("kvmerge")

PACKAGES = "kvmerge_backends"
"""Name of the namespace package that holds the packages with modules."""

_GPU, _INTEGRATED_GPU = 1, 2
"""Values of ``enum ggml_backend_dev_type``."""
_SOFTWARE = ("llvmpipe", "swiftshader")
"""What Vulkan calls devices that are the CPU."""


@dataclass(frozen=True)
class Device:
    """A device that ggml can compute on."""

    name: str
    description: str
    kind: int
    free: int
    """Bytes of its memory that are free."""
    total: int
    """Bytes of its memory."""

    @property
    def is_faster(self) -> bool:
        """Whether it is expected to be faster than the CPU."""
        software = any(word in self.description.lower() for word in _SOFTWARE)
        return self.kind in (_GPU, _INTEGRATED_GPU) and not software

    def __str__(self) -> str:
        return f"{self.name} ({self.description})"


@lru_cache(maxsize=1)
def library() -> Any:
    """Return libggml, with the types of what is called here."""
    ggml: Any = ctypes.CDLL(str(library_file("ggml")))
    base: Any = ctypes.CDLL(str(library_file("ggml-base")))
    text, handle, size = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t
    for library, name, result, arguments in (
        (ggml, "ggml_backend_reg_count", size, []),
        (ggml, "ggml_backend_reg_by_name", handle, [text]),
        (ggml, "ggml_backend_load", handle, [text]),
        (ggml, "ggml_backend_load_all_from_path", None, [text]),
        (ggml, "ggml_backend_register", None, [handle]),
        (base, "ggml_backend_reg_get_proc_address", handle, [handle, text]),
        (ggml, "ggml_backend_dev_count", size, []),
        (ggml, "ggml_backend_dev_get", handle, [size]),
        (base, "ggml_backend_dev_name", text, [handle]),
        (base, "ggml_backend_dev_description", text, [handle]),
        (base, "ggml_backend_dev_type", ctypes.c_int, [handle]),
        (base, "ggml_blck_size", ctypes.c_int64, [ctypes.c_int]),
        (base, "ggml_type_size", size, [ctypes.c_int]),
        (base, "ggml_backend_dev_memory", None, [handle, *[ctypes.POINTER(size)] * 2]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
        setattr(ggml, name, function)
    return ggml


def packages() -> list[Path]:
    """Return the folders of installed packages that hold a module, sorted by name."""
    spec = importlib.util.find_spec(PACKAGES)
    found: dict[str, Path] = {}
    for place in (spec and spec.submodule_search_locations) or ():
        for folder in Path(place).iterdir() if Path(place).is_dir() else ():
            if (folder / "__init__.py").is_file():
                found.setdefault(folder.name, folder)
    return [found[name] for name in sorted(found)]


def _load_package(folder: Path) -> None:
    """Load the modules of one package, or say in the log why it is not used."""
    name, version = f"kvmerge-{folder.name}", stated_version(folder)
    if version != __version__:
        log.warning(
            f"{name} is of version {version}, which does not fit kvmerge {__version__}, so it is "
            f"not used: pip install {name}=={__version__}"
        )
        return
    try:
        importlib.import_module(f"{PACKAGES}.{folder.name}")
        for file in sorted([*folder.glob("libggml-*"), *folder.glob("ggml-*")]):
            ctypes.CDLL(str(file))  # says more than ggml does
            if not library().ggml_backend_load(os.fsencode(file)):
                raise OSError(f"{file} is no back end of this ggml")
    except (ImportError, OSError) as error:
        log.warning(f"{name} is installed and cannot be used: {error}")


@lru_cache(maxsize=1)
def load() -> None:
    """Load the modules next to the library and those of packages, and the devices of RPC servers.

    Raises
    ------
    LibraryError
        If there is no module that runs on this machine, or a server does not answer.
    OptionError
        If the environment names a server in another way than ``host:port``.
    """
    ggml = library()
    # Each file that is loaded would be a line on stderr.
    importlib.import_module("llama_cpp._logger").set_verbose(False)
    if ggml.ggml_backend_reg_count() == 0:
        ggml.ggml_backend_load_all_from_path(os.fsencode(library_folder()))
    for folder in packages():
        if not ggml.ggml_backend_reg_by_name(folder.name.encode()):
            _load_package(folder)
    rpc.use_servers(ggml)
    if ggml.ggml_backend_reg_count() == 0:
        raise LibraryError(
            f"no ggml backend in {library_folder()} runs on this machine: {BUILD_AGAIN}"
        )


def devices() -> list[Device]:
    """Return all devices, in ggml's order."""
    ggml = library()
    found = []
    for i in range(ggml.ggml_backend_dev_count()):
        device = ggml.ggml_backend_dev_get(i)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        ggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        found.append(
            Device(
                ggml.ggml_backend_dev_name(device).decode(),
                ggml.ggml_backend_dev_description(device).decode(),
                ggml.ggml_backend_dev_type(device),
                free.value,
                total.value,
            )
        )
    return found


def unserved_hardware() -> str | None:
    """Return what is in this machine that no loaded back end computes on, where the system tells.

    For example ``"an NVIDIA GPU (/dev/nvidia0): kvmerge-cuda or kvmerge-vulkan"``.
    """
    if any(device.is_faster for device in devices()):
        return None
    windows = Path(os.environ.get("SYSTEMROOT", r"C:\Windows"))
    for file, what, serve in (
        ("/dev/nvidia0", "an NVIDIA GPU", "kvmerge-cuda or kvmerge-vulkan"),
        (windows / "System32" / "nvcuda.dll", "an NVIDIA GPU", "kvmerge-cuda or kvmerge-vulkan"),
        ("/dev/kfd", "an AMD GPU", "kvmerge-vulkan"),
        ("/dev/dri/renderD128", "a GPU", "kvmerge-vulkan"),
    ):
        if Path(file).exists():
            return f"{what} ({file}): {serve}"
    return None


def in_use(n_gpu_layers: int) -> tuple[str, str | None]:
    """Return what a model with that many layers on a GPU computes on, and what it leaves unused.

    Parameters
    ----------
    n_gpu_layers : int
        As in `kvmerge.Llama`; negative: all layers.
    """
    everything = devices()
    gpus = [device for device in everything if device.kind in (_GPU, _INTEGRATED_GPU)]
    faster = [str(device) for device in gpus if device.is_faster]
    rest = [str(device) for device in everything if device not in gpus]
    if n_gpu_layers != 0 and gpus:
        return ", ".join(map(str, gpus)), None
    return ", ".join(rest), ", ".join(faster) or None


def log_device(n_gpu_layers: int | None) -> None:
    """Log what a model that was loaded computes on, and what is faster and left unused.

    The second is a warning, once in a process, where nobody has chosen: ``n_gpu_layers`` is not
    given, and llama-cpp-python's default is the CPU.
    """
    used, unused = in_use(n_gpu_layers or 0)
    log.info(f"computes on {used}")
    if unused and n_gpu_layers is None:
        _warn_unused(unused)


@lru_cache(maxsize=1)
def _warn_unused(devices: str) -> None:
    log.warning(f"{devices} is unused: n_gpu_layers=-1 puts the model there, 0 keeps it silent")
