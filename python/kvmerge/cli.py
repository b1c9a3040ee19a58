"""The ``kvmerge`` command."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from .terminal import accept_any_text, complain, discard
from .version import __version__

COMMANDS = {
    "demo": "show pictures to a model, ask about them with the full and the merged cache",
    "eval": "measure what each method costs in answers, over tasks and budgets",
    "serve": "serve a model over HTTP with a cache that merges: llama-server, and its flags",
    "chat": "talk with a model in the terminal, and show it pictures",
    "fit": "say what a model, its cache and its pictures will take, before anything is loaded",
    "doctor": "say which libraries and devices are used, and whether they can merge",
    "rpc-server": "compute for kvmerge on other machines, over llama.cpp's RPC",
    "version": "print the versions of this package and of what it is built on",
}
"""Name of each command, and what it does."""

PASSES_ON = ("serve",)
"""Commands that read their arguments themselves, as most are another program's."""

FAILED, INTERRUPTED, NOBODY_READS = 1, 130, 141
"""Exit statuses; the last two are those of a shell for SIGINT and SIGPIPE."""

TRACEBACK = "KVMERGE_TRACEBACK"
"""Name of the environment variable that asks for tracebacks of unexpected errors."""


def _module(command: str) -> ModuleType:
    return import_module(f".commands.{command.replace('-', '_')}", __package__)


def parser(command: str | None) -> argparse.ArgumentParser:
    """Return the parser; only the module of `command` is imported."""
    whole = argparse.ArgumentParser(
        prog="kvmerge", description="A KV cache that merges instead of growing."
    )
    whole.add_argument("--version", action="version", version=f"kvmerge {__version__}")
    commands = whole.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}."
        )
        if name == command:
            _module(name).add_arguments(sub)
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    Returns
    -------
    int
        0, or 1 for an error that was said on stderr; 130 when it was interrupted, and 141 when
        whoever read its output stopped reading.
    """
    accept_any_text()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        try:
            return _run(arguments)
        finally:
            # Not left to Python's end, which can only complain about it.
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        if sys.stdout is not None:
            discard(sys.stdout)
        # EINVAL is what Windows says of a pipe that nobody reads.
        if error.errno in (errno.EPIPE, errno.EINVAL):
            return NOBODY_READS
        complain(f"kvmerge: the output cannot be written: {error.strerror}")
        return FAILED


def _run(arguments: list[str]) -> int:
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    if arguments[:1] == [command] and command in PASSES_ON:
        parsed = argparse.Namespace(command=command, arguments=arguments[1:])
    else:
        parsed = parser(command).parse_args(arguments)
    from .errors import KVMergeError

    name = f"kvmerge {parsed.command}"
    try:
        status: int = _module(parsed.command).run(parsed)
    except KVMergeError as error:
        complain(f"{name}: {error}")
        return FAILED
    except KeyboardInterrupt:
        complain(f"{name}: interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        complain(f"{name}: {_in_one_line(error)}")
        return FAILED
    return status


def _in_one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        file = f": {error.filename}" if error.filename is not None else ""
        return f"{error.strerror}{file}"
    said = " ".join(str(error).split())
    kind = type(error).__name__
    return f"{kind}: {said or 'no reason given'} ({TRACEBACK}=1 shows where)"


if __name__ == "__main__":
    sys.exit(main())
