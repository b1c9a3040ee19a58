"""``kvmerge serve``: llama-server with a cache that merges."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..policies import Policy

OURS = ("--kv-merge", "--kv-budget", "--kv-max-cells", "--keep-last-images")
"""Flags of merging, each of which may also be set in the environment as ``LLAMA_ARG_...``."""

MEDIA_URL = "--media-url"
MEDIA_URLS = ("none", "public", "any")
"""Which pictures that messages name by URL are fetched; told in the server's environment."""

IMAGE_MERGE = "--image-merge"
"""What others take and llama-server does not have: it is refused with the reason."""

CACHE_RAM = 512
"""MiB of host memory for copies of idle slots while merging is on: merged ones are small, and the
8192 of llama-server are all that a laptop has."""

PAGE = Path(__file__).resolve().parent.parent / "page"
"""What a browser sees, unless `--path` names another folder or the program has its own page."""

INTERFACE = "web-interface.json"
"""Lies beside a program that llama-server's own web interface was built into."""

_HELP = """\
usage: kvmerge serve MODEL [--mmproj MMPROJ] [flags of llama-server]

Serve a model over HTTP: OpenAI's API, as llama-server does, with a cache that merges.

  MODEL                 model (GGUF), or name it with -m
  --mmproj FILE         its vision or audio part (GGUF)
  --kv-merge POLICY     how the cache is merged; auto, or one of
{presets}
                        (default: none)
  --kv-budget N         what is kept: a share such as 0.2 (default), or a number of cells;
                        with auto it is of pictures and sound, and all text stays
  --kv-max-cells N      the most cells of all slots together, or bytes such as 512MiB
  --keep-last-images N  last pictures of each slot that merges leave as they are
  --media-url WHICH     which http:// pictures of messages are fetched: none (default), public
                        (not from this machine or its own network), or any
  --parallel N          slots: how many are served at once

All other flags are those of llama-server; `kvmerge serve --help-all` lists them. While merging is
on, --cache-ram is {cache_ram} unless told otherwise.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no options: what follows is read by `run`, and the rest by llama-server."""


def settings(given: Mapping[str, str]) -> list[str]:
    """Check the flags of merging and return them with the settings of the policy.

    Parameters
    ----------
    given : mapping
        Values by flag, of `OURS`.

    Raises
    ------
    PolicyError, BudgetError, OptionError
        If one is not accepted.
    """
    from ..budget import Budget
    from ..byte_size import parse_bytes
    from ..cap import Cap
    from ..errors import OptionError, PolicyError
    from ..policies import ArrayPolicy, resolve
    from .number import kept

    policy = resolve(given.get("--kv-merge"))
    if policy is None:
        for flag in ("--kv-max-cells", "--keep-last-images"):
            if flag in given:
                raise OptionError(f"{flag} needs --kv-merge, which is none: say how to merge")
        return []
    if isinstance(policy, ArrayPolicy):
        raise PolicyError(
            f"--kv-merge {policy.name}: this method is Python, which llama-server does not run"
        )
    try:
        budget = Budget(kept(given.get("--kv-budget", "0.2")))
    except argparse.ArgumentTypeError as error:
        raise OptionError(f"--kv-budget: {error}") from None
    policy.check_budget(budget)
    arguments = ["--kv-merge", policy.name, "--kv-budget", repr(budget.kept)]
    arguments += ["--kv-merge-params", native_settings(policy)]
    if (cells := given.get("--kv-max-cells")) is not None:
        limit = Cap(int(cells) if cells.isdecimal() else cells).limit
        if isinstance(limit, str):
            cells = f"{parse_bytes('--kv-max-cells', limit) // 1024}KiB"
        arguments += ["--kv-max-cells", cells]
    if (whole := given.get("--keep-last-images")) is not None:
        if not whole.isdecimal():
            raise OptionError(f"--keep-last-images {whole}: it must be a whole number, 0 or more")
        arguments += ["--keep-last-images", whole]
    return arguments


def native_settings(policy: Policy) -> str:
    """Return the settings of a policy as `--kv-merge-params` takes them."""
    return ",".join(f"{k}={float(v):.9g}" for k, v in policy.engine_params().items())


def command_line(arguments: list[str]) -> tuple[list[str], str]:
    """Return what llama-server is started with, and which URLs of media it may fetch.

    Raises
    ------
    PolicyError, BudgetError, OptionError
        If a flag of ours is not accepted.
    UnsupportedError
        If tokens of pictures were to be merged.
    """
    from ..errors import OptionError, UnsupportedError

    if arguments and not arguments[0].startswith("-"):
        arguments = ["--model", *arguments]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in (*OURS, MEDIA_URL, IMAGE_MERGE):
        parser.add_argument(flag, dest=flag, default=os.environ.get(_variable(flag)))
    try:
        parsed, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise OptionError(str(error)) from None
    given = {flag: value for flag, value in vars(parsed).items() if value is not None}
    if given.pop(IMAGE_MERGE, None):
        raise UnsupportedError(
            f"{IMAGE_MERGE} ({_variable(IMAGE_MERGE)}): llama-server reads every token of a "
            "picture. What reads those that are alike as one is kvmerge.Llama(image_merge=...), "
            "`kvmerge chat`, and over HTTP `python -m kvmerge.llama_cpp_server --image_merge`"
        )
    which = given.pop(MEDIA_URL, "none")
    if which not in MEDIA_URLS:
        raise OptionError(f"{MEDIA_URL} {which}: it must be one of {', '.join(MEDIA_URLS)}")
    merging = settings(given)
    if merging and not _is_said(rest, "LLAMA_ARG_CACHE_RAM", "--cache-ram", "-cram"):
        merging += ["--cache-ram", str(CACHE_RAM)]
    if not has_interface() and not _is_said(rest, "LLAMA_ARG_STATIC_PATH", "--path"):
        rest += ["--path", os.fspath(PAGE)]
    return [*rest, *merging], which


def _is_said(arguments: list[str], variable: str, *flags: str) -> bool:
    names = {argument.partition("=")[0] for argument in arguments}
    return variable in os.environ or not names.isdisjoint(flags)


def _variable(flag: str) -> str:
    return "LLAMA_ARG_" + flag.strip("-").replace("-", "_").upper()


def program() -> Path:
    """Return the server's file.

    Raises
    ------
    LibraryError
        If the package was built without it.
    """
    from ..errors import LibraryError
    from ..native.library import BUILD_AGAIN, library_folder

    name = "llama-server.exe" if sys.platform == "win32" else "llama-server"
    file = library_folder() / name
    if not file.is_file():
        raise LibraryError(
            f"{name} is not in {library_folder()}: this build has no server (KVMERGE_SERVER=OFF); "
            f"{BUILD_AGAIN}"
        )
    return file


def has_interface() -> bool:
    """Return whether llama-server's own web interface was built into the program."""
    from ..native.library import library_folder

    return (library_folder() / INTERFACE).is_file()


def environment(media_url: str) -> dict[str, str]:
    """Return the server's environment.

    It says which URLs of media may be fetched, and names a back end that is a package of its own.
    """
    from ..native import backends

    variables = dict(os.environ)
    # What is read here must not be read again: the flags say it.
    for flag in OURS:
        variables.pop(_variable(flag), None)
    variables[_variable(MEDIA_URL)] = media_url
    modules = [
        file
        for folder in backends.packages()
        for file in sorted([*folder.glob("libggml-*"), *folder.glob("ggml-*")])
    ]
    if modules:
        variables.setdefault("GGML_BACKEND_PATH", os.fspath(modules[0]))
    return variables


def run(arguments: argparse.Namespace) -> int:
    """Become the server, or on Windows wait for it; return its exit status."""
    given: list[str] = arguments.arguments
    if not given or given[0] in ("-h", "--help"):
        from ..policies import PRESETS, ArrayPolicy

        indent = " " * 24
        served = [n for n, policy in PRESETS.items() if not isinstance(policy, ArrayPolicy)]
        names = textwrap.fill(
            ", ".join(served), 88, initial_indent=indent, subsequent_indent=indent
        )
        print(_HELP.format(presets=names, cache_ram=CACHE_RAM))
        raise SystemExit(0 if given else 2)
    rest, media_url = (["--help"], "none") if given[0] == "--help-all" else command_line(given)
    line = [os.fspath(program()), *rest]
    variables = environment(media_url)
    sys.stdout.flush()
    if sys.platform != "win32":
        os.execve(line[0], line, variables)
    try:
        return subprocess.call(line, env=variables)
    except KeyboardInterrupt:
        return 0
