"""Devices of other machines: llama.cpp's RPC, by the package ``kvmerge-rpc``.

A process that computes for others is started with ``kvmerge rpc-server`` (or llama.cpp's
``ggml-rpc-server`` of the same release).  One that uses it names it in the environment variable
`SERVERS`; the model's layers and their cache then lie there with ``n_gpu_layers=-1``.
"""

from __future__ import annotations

import ctypes
import os
import socket
from typing import Any

from ..errors import LibraryError, OptionError

SERVERS = "KVMERGE_RPC_SERVERS"
"""Name of the environment variable with the servers to use: ``host:port``, more with commas."""

SECONDS = 5.0
"""How long a server may take to answer when it is asked for the first time."""

_CPU, _GPU, _INTEGRATED_GPU = 0, 1, 2


def _function(ggml: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """Return a function of the RPC module.

    Raises
    ------
    LibraryError
        If the module is not there.
    """
    back_end = ggml.ggml_backend_reg_by_name(b"RPC")
    address = back_end and ggml.ggml_backend_reg_get_proc_address(back_end, name.encode())
    if not address:
        raise LibraryError(
            "devices of other machines need llama.cpp's RPC back end, which is not there: "
            'pip install "kvmerge[rpc]"'
        )
    return ctypes.CFUNCTYPE(result, *arguments)(address)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise OptionError(f"{SERVERS} has {address!r}: a server is named host:port, 1 to 65535")
    return host, int(port)


def use_servers(ggml: Any) -> None:
    """Add the devices of the servers that the environment names, for this process.

    Raises
    ------
    OptionError
        If one is not ``host:port``.
    LibraryError
        If one does not answer, or the back end is missing.
    """
    for address in filter(None, (part.strip() for part in os.environ.get(SERVERS, "").split(","))):
        place = _split(address)
        try:
            # ggml ends the process when it cannot connect
            socket.create_connection(place, timeout=SECONDS).close()
        except OSError as error:
            raise LibraryError(
                f"the RPC server {address} that {SERVERS} names does not answer ({error}): start "
                f"it there with `kvmerge rpc-server --port {place[1]}`"
            ) from None
        add = _function(ggml, "ggml_backend_rpc_add_server", ctypes.c_void_p, [ctypes.c_char_p])
        server = add(address.encode())
        if not server:
            raise LibraryError(f"the RPC server {address} that {SERVERS} names has no device")
        ggml.ggml_backend_register(server)


def serve(ggml: Any, host: str, port: int, threads: int) -> str:
    """Compute for other processes until this one is ended; return what it did not do.

    Parameters
    ----------
    ggml
        The library.
    host, port
        Where to listen.
    threads
        Threads of the CPU, where it computes.
    """
    start = _function(
        ggml,
        "ggml_backend_rpc_start_server",
        None,
        [ctypes.c_char_p, ctypes.c_char_p, *[ctypes.c_size_t] * 2, ctypes.c_void_p],
    )
    everything = [ggml.ggml_backend_dev_get(i) for i in range(ggml.ggml_backend_dev_count())]
    kinds = [ggml.ggml_backend_dev_type(device) for device in everything]
    pairs = list(zip(everything, kinds, strict=True))
    devices = [device for device, kind in pairs if kind in (_GPU, _INTEGRATED_GPU)]
    devices = devices or [device for device, kind in pairs if kind == _CPU]
    array = (ctypes.c_void_p * len(devices))(*devices)
    start(f"{host}:{port}".encode(), None, threads, len(devices), array)
    return f"nothing listens on {host}:{port}: is the port in use?"
