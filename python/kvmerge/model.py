"""What chats and reports need of a `Llama`."""

# ruff: noqa: D102  (`Llama` and llama-cpp-python say what they do)

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from .cache import KVCache
from .native.binding import Engine
from .prompt import Prompt
from .reading import PromptReader
from .settings import Settings
from .stats import KVStats
from .turns import Turns


class Model(Protocol):
    """A `kvmerge.Llama`, as chats and reports see it: they know nothing else of it.

    The first half is llama-cpp-python's, where it is described.
    """

    model_path: str
    metadata: dict[str, str]
    verbose: bool
    n_threads_batch: int
    context_params: Any
    chat_format: str | None
    chat_handler: Any

    @property
    def ctx(self) -> Any: ...
    @property
    def model(self) -> Any: ...
    @property
    def create_completion(self) -> Callable[..., Any]: ...
    @property
    def create_chat_completion(self) -> Callable[..., Any]: ...

    def tokenize(self, text: bytes, add_bos: bool = ..., special: bool = ...) -> list[int]: ...
    def token_bos(self) -> int: ...
    def token_eos(self) -> int: ...
    def n_embd(self) -> int: ...

    kv_cache: KVCache
    reader: PromptReader
    settings: Settings
    turns: Turns

    @property
    def engine(self) -> Engine | None: ...
    @property
    def n_batch(self) -> int: ...

    def read(self, prompt: Prompt, *, merge: bool = ..., answer: bool = ...) -> None: ...
    def kv_stats(self) -> KVStats: ...
    def usage(self) -> dict[str, Any]: ...
    def text_handler(self) -> Any: ...
    def check_media(self, messages: list[Any]) -> None: ...
    def at_close(self, function: Callable[[], None]) -> None: ...
