"""Find the files of a model: in a repository of the Hugging Face hub, or in a local folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol

from .errors import ModelError, did_you_mean

StrPath = str | os.PathLike[str]


class Repository(Protocol):
    """Where the files of a model are."""

    def names(self) -> list[str]:
        """Return the names of all files, with the folders that they are in."""

    def get(self, name: str) -> Path:
        """Return a file on this machine."""


class Folder:
    """A local folder, laid out as a repository."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def names(self) -> list[str]:
        """Return the names of all files."""
        files = (file for file in self._folder.rglob("*") if file.is_file())
        return sorted(file.relative_to(self._folder).as_posix() for file in files)

    def get(self, name: str) -> Path:
        """Return a file."""
        return self._folder / name


class Hub:
    """A repository of the hub, fetched by huggingface_hub.

    Raises
    ------
    ModelError
        If huggingface_hub is not installed, or the hub cannot be reached or refuses.
    """

    def __init__(self, repo_id: str, local_dir: StrPath | None, cache_dir: StrPath | None) -> None:
        try:
            import huggingface_hub
        except ImportError as error:
            raise ModelError(
                f"from_pretrained({repo_id!r}) needs the package huggingface_hub (`pip install "
                "huggingface_hub`); a local folder does not"
            ) from error
        self._hub: Any = huggingface_hub
        self._repo_id = repo_id
        self._where = {"local_dir": local_dir, "cache_dir": cache_dir}

    def names(self) -> list[str]:
        """Return the names of all files."""
        return list(self._asked(self._hub.list_repo_files, self._repo_id))

    def get(self, name: str) -> Path:
        """Return a file, which is fetched if it is not there."""
        return Path(self._asked(self._hub.hf_hub_download, self._repo_id, name, **self._where))

    def _asked(self, call: Any, *args: Any, **options: Any) -> Any:
        try:
            return call(*args, **options)
        except Exception as error:  # of requests, httpx or the hub, by its version
            reason = str(error).partition("\n")[0][:300]
            raise ModelError(
                f"the files of {self._repo_id!r} cannot be had from the hub: "
                f"{type(error).__name__}: {reason}"
            ) from error


def repository(
    repo_id: StrPath, local_dir: StrPath | None = None, cache_dir: StrPath | None = None
) -> Repository:
    """Return the repository of that name, or the local folder if there is one."""
    folder = Path(repo_id).expanduser()
    if folder.is_dir():
        return Folder(folder)
    return Hub(os.fspath(repo_id), local_dir, cache_dir)


def only_match(repo_id: StrPath, names: Sequence[str], pattern: str, option: str) -> str:
    """Return the one file that a name or pattern stands for.

    Raises
    ------
    ModelError
        If none does, or several.
    """
    found = [name for name in names if name == pattern or fnmatch(name, pattern)]
    if len(found) == 1:
        return found[0]
    shown = ", ".join((found or list(names))[:12]) or "no files"
    if found:
        raise ModelError(f"{option}={pattern!r} matches several files of {repo_id}: {shown}")
    raise ModelError(
        f"{option}={pattern!r} matches no file of {repo_id}, which has {shown}."
        f"{did_you_mean(pattern, names)}"
    )


def fetch(
    repo_id: StrPath,
    filename: str,
    mmproj: str | None,
    additional_files: Sequence[str],
    local_dir: StrPath | None = None,
    cache_dir: StrPath | None = None,
) -> tuple[Path, Path | None]:
    """Return a model and the mmproj that goes with it; see `Llama.from_pretrained`."""
    files = repository(repo_id, local_dir, cache_dir)
    names = files.names()
    model = files.get(only_match(repo_id, names, filename, "filename"))
    for pattern in additional_files:
        name = only_match(repo_id, names, pattern, "additional_files")
        files.get(name)
        if mmproj is None and "mmproj" in Path(name).name.lower():
            mmproj = name
    if mmproj is None:
        return model, None
    return model, files.get(only_match(repo_id, names, mmproj, "mmproj"))
