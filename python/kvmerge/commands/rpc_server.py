"""``kvmerge rpc-server``: compute for other machines."""

from __future__ import annotations

import argparse
import os
import signal

from ..errors import LibraryError
from ..native.loading import load
from .number import MOST_THREADS, Whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s, this machine alone). Whoever reaches it "
        "can read and write the memory of this process: never an open network",
    )
    parser.add_argument(
        "--port", type=Whole(1, 65535), default=50052, help="where (default: %(default)s)"
    )
    parser.add_argument(
        "--threads",
        type=Whole(1, MOST_THREADS),
        default=max(1, (os.cpu_count() or 2) // 2),
        help="threads of the CPU, which computes where there is no other device "
        "(default: half of them)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until the process is ended."""
    from ..native import backends, rpc

    # It computes here, also where the same environment serves those who use it.
    os.environ.pop(rpc.SERVERS, None)
    load()
    # The server never returns to Python, which would see to Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    problem = rpc.serve(backends.library(), arguments.host, arguments.port, arguments.threads)
    raise LibraryError(problem)
