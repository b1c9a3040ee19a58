"""Devices of other machines: what is said when one cannot be used."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from kvmerge.errors import LibraryError, OptionError
from kvmerge.native import backends, rpc

WITH_MODULE = any(folder.name == "rpc" for folder in backends.packages())


@pytest.fixture
def port() -> Iterator[int]:
    """A port that something listens on, which says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


@pytest.mark.parametrize("address", ["50052", "host:", ":50052", "host:0", "host:65536", "host:x"])
def test_a_server_that_is_not_named_rightly(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(rpc.SERVERS, address)
    with pytest.raises(OptionError, match="a server is named host:port, 1 to 65535"):
        rpc.use_servers(backends.library())


def test_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        silent = closed.getsockname()[1]
    monkeypatch.setenv(rpc.SERVERS, f" , 127.0.0.1:{silent}")
    with pytest.raises(LibraryError, match=f"kvmerge rpc-server --port {silent}"):
        rpc.use_servers(backends.library())


def test_the_environment_is_read_before_the_first_model() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import kvmerge; kvmerge.Llama"],
        env=os.environ | {rpc.SERVERS: "nowhere"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"OptionError: {rpc.SERVERS} has 'nowhere'" in done.stderr


@pytest.mark.skipif(WITH_MODULE, reason="the RPC back end is there")
def test_without_the_back_end_the_package_is_named(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(rpc.SERVERS, f"127.0.0.1:{port}")
    with pytest.raises(LibraryError, match=r'pip install "kvmerge\[rpc\]"'):
        rpc.use_servers(backends.library())
