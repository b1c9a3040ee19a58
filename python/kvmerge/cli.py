"""The ``kvmerge`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from . import __version__

COMMANDS = {
    "demo": "show pictures to a model, ask about them with the full and the merged cache",
    "eval": "measure what each method costs in answers, over tasks and budgets",
    "fit": "say what a model, its cache and its pictures will take, before anything is loaded",
    "doctor": "say which libraries and devices are used, and whether they can merge",
    "version": "print the versions of this package and of what it is built on",
}
"""Name of each command, which is also that of its module, and what it does."""


def _parser(command: str | None) -> argparse.ArgumentParser:
    """Return the parser; only the module of `command` is imported."""
    parser = argparse.ArgumentParser(
        prog="kvmerge", description="A KV cache that merges instead of growing."
    )
    parser.add_argument("--version", action="version", version=f"kvmerge {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}."
        )
        if name == command:
            import_module(f".commands.{name}", __package__).add_arguments(sub)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    parsed = _parser(command).parse_args(arguments)
    from .errors import KVMergeError

    try:
        status: int = import_module(f".commands.{parsed.command}", __package__).run(parsed)
    except KVMergeError as error:
        print(f"kvmerge {parsed.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"kvmerge {parsed.command}: interrupted", file=sys.stderr)
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
