"""Run the tests with model and cache on RPC servers: ``python tools/rpc_tests.py --servers 2``.

Builds the back end's module as the package `kvmerge-rpc` does (`packages/`), puts it beside the
installed kvmerge, or the libraries of a source tree, starts servers on this machine, each of which
computes on the CPU, and runs the tests of the oracle, the cache's size, memories, layers, saved
states and chats with ``n_gpu_layers=-1``.  The layers are divided between the servers.

What follows ``--`` goes to pytest, instead of the default files where it names some.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("oracle", "room", "memories", "layers", "saving", "chat")
BUILD = ROOT / "build" / "rpc"
# The environment's own cmake and ninja serve when the machine has none.
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])


def build(jobs: int) -> Path:
    """Build the back end's module; return the folder for Python's path that it is installed in."""
    site = BUILD / "site"
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=PATH) else []
    for command in (
        ["-S", ROOT / "packages", "-B", BUILD, *generator, "-DCMAKE_BUILD_TYPE=Release",
         "-DKVMERGE_BACKEND=rpc", f"-DPython3_EXECUTABLE={sys.executable}"],
        ["--build", BUILD, "--target", "ggml-rpc", "--parallel", jobs],
        ["--install", BUILD, "--component", "kvmerge-backend", "--prefix", site],
    ):  # fmt: skip
        print("+ cmake", *command, flush=True)
        cmake = shutil.which("cmake", path=PATH) or "cmake"
        subprocess.run([cmake, *map(str, command)], check=True, env=os.environ | {"PATH": PATH})
    package = ROOT / "packages" / "rpc" / "kvmerge_backends" / "rpc"
    shutil.copy2(package / "__init__.py", site / "kvmerge_backends" / "rpc")
    return site


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def servers(n: int, environment: dict[str, str]) -> Iterator[list[str]]:
    """Start servers of the CPU; yield their addresses, and end them."""
    running, addresses = [], []
    try:
        for _ in range(n):
            port = _free_port()
            addresses.append(f"127.0.0.1:{port}")
            command = [sys.executable, "-m", "kvmerge", "rpc-server", "--port", str(port)]
            running.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
        for address, server in zip(addresses, running, strict=True):
            _wait_for(address, server)
        yield addresses
    finally:
        for server in running:
            server.kill()
            server.wait()


def _wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    host, port = address.split(":")
    for _ in range(300):
        try:
            socket.create_connection((host, int(port))).close()
        except OSError:
            if server.poll() is not None:
                break
            time.sleep(0.1)
        else:
            return
    raise SystemExit(f"the server at {address} does not answer")


def main(arguments: list[str] | None = None) -> int:
    """Build, and run the tests; return pytest's exit status."""
    own, rest = (sys.argv[1:] if arguments is None else arguments), []
    if "--" in own:
        own, rest = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--servers", type=int, default=1, help="how many (default: 1)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="of the build")
    options = parser.parse_args(own)

    site = build(options.jobs)
    paths = [str(site), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "KVMERGE_TEST_GPU_LAYERS": "-1",
    }
    with servers(options.servers, environment) as addresses:
        environment["KVMERGE_RPC_SERVERS"] = ",".join(addresses)
        files = [arg for arg in rest if "test_" in arg]
        files += [] if files else [str(ROOT / "tests" / f"test_{name}.py") for name in TESTS]
        others = [arg for arg in rest if "test_" not in arg]
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-ra", *others, *files],
            env=environment,
            cwd=ROOT,
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
