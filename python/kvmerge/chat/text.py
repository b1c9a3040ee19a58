"""Chats of text only: the chat formats of llama-cpp-python, with what they leave out put right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_cpp import llama_chat_format

from ..errors import KVMergeError, OptionError, UnsupportedError, did_you_mean
from ..model import Model
from .continuation import Continuation
from .messages import check_text, joined, warn_of_left_out
from .template import cannot_show, takes_parts, token_text


class TextHandler:
    """The chat handler of a chat format; `Llama` puts it in the place of llama-cpp-python's own.

    A format that shows only texts gets the parts of a message joined, BOS stands once, and what a
    format raises about messages is an `OptionError`.

    Parameters
    ----------
    name : str
        The chat format.
    format : callable
        Its handler.
    """

    def __init__(self, name: str, format: Any) -> None:
        self._name = name
        self._format = format
        self._takes_parts: bool | None = None

    @classmethod
    def of(cls, name: str, handlers: Mapping[str, Any]) -> TextHandler:
        """Return the handler of a chat format by name.

        Parameters
        ----------
        name : str
            The chat format.
        handlers : mapping
            Those of the model's own formats, by name.
        """
        known = handlers.get(name)
        if isinstance(known, cls):
            return known
        try:
            return cls(name, known or llama_chat_format.get_chat_completion_handler(name))
        except llama_chat_format.LlamaChatCompletionHandlerNotFoundException as error:
            names = sorted({*handlers, *_registered()})
            raise OptionError(
                f"chat_format={name!r} is not a chat format.{did_you_mean(name, names)} Known: "
                + ", ".join(names)
            ) from error

    def __call__(self, *, llama: Model, messages: list[dict[str, Any]], **options: Any) -> Any:
        """Answer a chat."""
        for name in ("functions", "tools"):
            check_text(options.get(name), name)
        end = Continuation(messages)
        shown = end.marked(messages)
        shown = shown if self._shows(llama, messages) else joined(shown)
        reader = _Reader(llama, self._name, messages, end)
        try:
            return self._format(llama=reader, messages=shown, **options)
        except (KVMergeError, MemoryError):
            raise
        except Exception as error:  # A format runs operations of Python on what it is given.
            if reader.is_reached:
                raise
            raise cannot_show(error) from error

    def _shows(self, llama: Model, messages: list[dict[str, Any]]) -> bool:
        if all(isinstance(message["content"], str) for message in messages):
            return True
        if self._takes_parts is None:
            self._takes_parts = takes_parts(lambda tried: self._text(llama, tried))
        return self._takes_parts

    def tokens(self, llama: Model, messages: list[dict[str, Any]], options: Any) -> list[int]:
        """Return the prompt of a chat, which is not read.

        Raises
        ------
        OptionError
            If the format does not take the messages.
        """
        try:
            self(llama=_Asked(llama), messages=messages, **{**options, "stream": False})
        except _PromptMade as made:
            return made.tokens
        raise UnsupportedError(
            f"chat_format={self._name!r} completes no prompt: context() needs one that does"
        )

    def _text(self, llama: Model, messages: list[dict[str, Any]]) -> str:
        asked = _Asked(llama)
        try:
            self._format(llama=asked, messages=messages)
        except _PromptMade as made:
            return made.text
        raise OptionError(f"chat_format={self._name!r} completes no prompt")


def _registered() -> list[str]:
    registry: Any = llama_chat_format.LlamaChatCompletionHandlerRegistry()
    return list(registry._chat_handlers)


class _Stand:
    """Stands before a `Llama` for a chat format, which turns messages into a prompt."""

    def __init__(self, llama: Model) -> None:
        self._llama = llama

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llama, name)


class _Reader(_Stand):
    """Writes BOS once, ends the prompt where the answer begins, and knows how far a format came."""

    def __init__(
        self, llama: Model, name: str, messages: list[dict[str, Any]], end: Continuation
    ) -> None:
        super().__init__(llama)
        self._name = name
        self._messages = messages
        self._end = end
        self.is_reached = False

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        what = f"chat_format={self._name!r}"
        prompt = self._end.cut(text.decode("utf-8"))
        warn_of_left_out(self._messages, prompt, what)
        text = prompt.encode("utf-8")
        if add_bos and special and (token := self._llama.token_bos()) != -1:
            add_bos = not text.startswith(token_text(self._llama, token).encode() or b"\0")
        return self._llama.tokenize(text, add_bos, special)

    def create_completion(self, prompt: str | list[int], **options: Any) -> Any:
        if isinstance(prompt, str):
            prompt = self._end.cut(prompt)
        self.is_reached = True
        return self._llama.create_completion(prompt, **options)


class _Asked(_Stand):
    """Lets a chat format make its prompt; nothing is read.

    llama-cpp-python keeps no function that returns the prompt of a format: a format is a function
    that ends in `create_completion`, and what it makes of an answer, or whether it asks again, is
    its own affair.  So it is left by an exception at the place where it would have read.
    """

    _text = ""

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        self._text = text.decode("utf-8", "replace")
        return self._llama.tokenize(text, add_bos, special)

    def create_completion(self, prompt: str | list[int], **_: Any) -> Any:
        if isinstance(prompt, str):
            prompt = self.tokenize(prompt.encode("utf-8"), special=True)
        raise _PromptMade(list(prompt), self._text)


class _PromptMade(Exception):
    """The prompt that a chat format would have completed."""

    def __init__(self, tokens: list[int], text: str) -> None:
        super().__init__("a chat format made its prompt")
        self.tokens = tokens
        self.text = text
