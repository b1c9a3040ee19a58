"""llama-cpp-python's own server with `kvmerge.Llama`: ``python -m kvmerge.llama_cpp_server``.

It takes the settings of that server, as options and in files, and those of `kvmerge.Llama`; in
Python ``create_app(Settings(model=...))`` returns the FastAPI application.  Messages come from
others here: they may name no files and no URLs unless the settings say so.
"""

# ruff: noqa: UP006, UP035, UP045 (the server's parser of options knows no other form of types)
from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, List, Optional

from .errors import KVMergeError, LibraryError, OptionError
from .media.access import MediaAccess
from .native.loading import load
from .terminal import complain

_NEEDED = {
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "sse_starlette": "sse-starlette",
    "starlette_context": "starlette-context",
    "pydantic_settings": "pydantic-settings",
}


def _check_packages() -> None:
    if missing := [package for name, package in _NEEDED.items() if find_spec(name) is None]:
        raise LibraryError(
            f"llama-cpp-python's server needs {', '.join(missing)}: pip install {' '.join(missing)}"
        )


try:
    _check_packages()
except LibraryError as error:
    if __name__ == "__main__":
        sys.exit(f"kvmerge.llama_cpp_server: {error}")
    raise
llama_cpp = load()

import pydantic  # noqa: E402
from fastapi import FastAPI  # noqa: E402
from llama_cpp.server import app as stock_app  # noqa: E402
from llama_cpp.server import model as stock_model  # noqa: E402
from llama_cpp.server import settings as stock_settings  # noqa: E402
from llama_cpp.server.cli import add_args_from_model, parse_model_from_args  # noqa: E402
from pydantic import Field  # noqa: E402

from .llama import Llama  # noqa: E402


class ModelSettings(stock_settings.ModelSettings):
    """Settings of a model: those of the server, and the options of `kvmerge.Llama`."""

    mmproj: Optional[str] = Field(default=None, description="The vision or audio part (GGUF).")
    kv_merge: Optional[str] = Field(default=None, description="How the cache is merged: a name.")
    kv_budget: str = Field(default="0.2", description="What is kept: 0.2 is a share, 512 cells.")
    merge_before: int = Field(default=0, description="Last tokens that are read after the merge.")
    kv_max_cells: Optional[str] = Field(
        default=None, description="The most cells, such as 2048, or bytes, such as 512MiB."
    )
    keep_last_images: int = Field(default=0, description="Last pictures that are left as they are.")
    image_min_tokens: Optional[int] = Field(default=None, description="Least tokens of a picture.")
    image_max_tokens: Optional[int] = Field(default=None, description="Most tokens of a picture.")
    image_merge: Optional[float] = Field(
        default=None, description="Cosine from which tokens of a picture are read as one."
    )
    image_cache: str = Field(default="256MiB", description="What encoded pictures may take.")
    media_folders: List[str] = Field(
        default=[], description="Folders whose files messages may name."
    )
    media_urls: List[str] = Field(
        default=[], description="Hosts whose URLs messages may name; * for all public ones."
    )

    @pydantic.model_validator(mode="after")
    def _goes_together(self) -> ModelSettings:
        if self.cache and self.kv_merge is not None:
            raise ValueError("cache does not go with kv_merge: merged cells cannot be cut")
        return self

    def options(self) -> dict[str, Any]:
        """Return the options of `kvmerge.Llama` beside those that the server passes."""
        urls: bool | list[str] = True if "*" in self.media_urls else self.media_urls
        return {
            "mmproj": self.mmproj,
            "kv_merge": self.kv_merge,
            "kv_budget": _number(self.kv_budget),
            "merge_before": self.merge_before,
            "kv_max_cells": None if self.kv_max_cells is None else _number(self.kv_max_cells),
            "keep_last_images": self.keep_last_images,
            "image_min_tokens": self.image_min_tokens,
            "image_max_tokens": self.image_max_tokens,
            "image_merge": self.image_merge,
            "image_cache": self.image_cache,
            "media_access": MediaAccess(folders=self.media_folders, urls=urls),
        }


class Settings(stock_settings.ServerSettings, ModelSettings):
    """Settings of a server with one model."""


class FileSettings(stock_settings.ServerSettings):
    """A file of settings: those of the server, and of one or more models."""

    models: List[ModelSettings] = Field(description="The models.")


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _with_class(made_by: Any) -> ModuleType:
    """Return ``llama_cpp`` with another `Llama`, for modules that look it up there."""
    module = ModuleType("llama_cpp")
    module.__dict__.update(vars(llama_cpp))
    module.Llama = made_by  # type: ignore[attr-defined]
    return module


class _Maker:
    """Makes a `kvmerge.Llama` where the server makes one of llama-cpp-python."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options

    def __call__(self, **options: Any) -> Llama:
        return Llama(**_known(options), **self._options)

    def from_pretrained(self, **options: Any) -> Llama:
        return Llama.from_pretrained(**_known(options), **self._options)


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """Return options without those that this server passes always, and no class takes any more."""
    forgotten = ("mul_mat_q", "rpc_servers" if options.get("rpc_servers") is None else "")
    return {name: value for name, value in options.items() if name not in forgotten}


@contextmanager
def _making(options: dict[str, Any]) -> Iterator[None]:
    before = stock_model.llama_cpp
    stock_model.llama_cpp = _with_class(_Maker(options))
    try:
        yield
    finally:
        stock_model.llama_cpp = before


class _Models(stock_model.LlamaProxy):
    """The models of the server, of our class."""

    @staticmethod
    def load_llama_from_model_settings(settings: ModelSettings) -> Llama:
        with _making(settings.options()):
            return stock_model.LlamaProxy.load_llama_from_model_settings(settings)


def _of_request(error: Exception) -> bool:
    return isinstance(error, KVMergeError) and isinstance(error, (ValueError, TypeError))


def _say_errors_of_requests() -> None:
    """Let what is wrong with a request be said with status 400, and not 500 and a traceback."""
    usual = stock_app.RouteErrorHandler.error_message_wrapper
    if getattr(usual, "says_errors_of_requests", False):
        return

    def wrapper(self: Any, error: Exception, body: Any = None) -> Any:
        if _of_request(error):
            said = {"message": str(error), "type": "invalid_request_error"}
            return 400, {**said, "param": None, "code": None}
        return usual(self, error, body)

    wrapper.says_errors_of_requests = True  # type: ignore[attr-defined]
    stock_app.RouteErrorHandler.error_message_wrapper = wrapper


def create_app(
    settings: Settings | None = None,
    server_settings: stock_settings.ServerSettings | None = None,
    model_settings: Sequence[ModelSettings] | None = None,
) -> FastAPI:
    """Return the application of llama-cpp-python's server, with `kvmerge.Llama` behind it.

    Parameters
    ----------
    settings : Settings
        The server and one model; or instead
    server_settings, model_settings
        the server, and several models.

    Raises
    ------
    OptionError
        If there is no model.
    """
    if settings is not None:
        server_settings, model_settings = settings, [settings]
    if server_settings is None or not model_settings:
        raise OptionError("the server needs the settings of at least one model")
    stock_app.llama_cpp = _with_class(Llama)
    stock_app.LlamaProxy = _Models
    _say_errors_of_requests()
    return stock_app.create_app(
        server_settings=server_settings, model_settings=list(model_settings)
    )


def _read_file(file: Path) -> FileSettings:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise OptionError(f"{file} cannot be read: {error.strerror}") from error
    if file.suffix in (".yaml", ".yml"):
        if find_spec("yaml") is None:
            raise LibraryError(f"{file} needs PyYAML: pip install PyYAML")
        import yaml

        text = json.dumps(yaml.safe_load(text))
    return FileSettings.model_validate_json(text)


def _settings(arguments: Sequence[str] | None) -> tuple[Any, list[ModelSettings]]:
    parser = argparse.ArgumentParser(
        prog="python -m kvmerge.llama_cpp_server",
        description="llama-cpp-python's server with a cache that merges.",
    )
    add_args_from_model(parser, Settings)
    parser.add_argument("--config_file", type=Path, help="a file of settings, JSON or YAML")
    parsed = parser.parse_args(arguments)
    file = os.environ.get("CONFIG_FILE", parsed.config_file)
    try:
        if file:
            read = _read_file(Path(file))
            return read, read.models
        server = parse_model_from_args(stock_settings.ServerSettings, parsed)
        return server, [parse_model_from_args(ModelSettings, parsed)]
    except pydantic.ValidationError as error:
        said = "; ".join(
            f"{'.'.join(map(str, each['loc'])) or 'settings'}: {each['msg']}"
            for each in error.errors()
        )
        raise OptionError(said) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve; return the exit status, 1 for an error that was said on stderr."""
    import uvicorn

    try:
        server, models = _settings(arguments)
        app = create_app(server_settings=server, model_settings=models)
    except KVMergeError as error:
        complain(f"kvmerge.llama_cpp_server: {error}")
        return 1
    uvicorn.run(
        app,
        host=os.environ.get("HOST", server.host),
        port=int(os.environ.get("PORT", server.port)),
        ssl_keyfile=server.ssl_keyfile,
        ssl_certfile=server.ssl_certfile,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
