"""Read once, ask many times: independent questions about the same messages."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any, Protocol

from llama_cpp.llama import Llama as StockLlama

from ..cache import Snapshot
from ..errors import OptionError, StateError, UnsupportedError
from ..media.part import find_media
from ..model import Model
from ..prompt import Prompt
from ..turns import takes_turn
from .handler import ChatHandler
from .messages import check_messages
from .request import Request
from .text import TextHandler

log = logging.getLogger("kvmerge")

Messages = list[Any]

_ANY_MESSAGE = (("user", "A"), ("user", "?"), ("assistant", "A"))
"""Messages to try: what chats that go on with one of them have in common comes before any."""

_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(StockLlama.create_chat_completion).parameters.items()
    if name not in ("self", "messages")
}
"""Options of a chat."""


class Context:
    """Messages that are read and merged once, and answer any number of questions.

    `Llama.context` makes it; it reads when it is entered::

        with llm.context(messages) as ctx:
            ctx.ask("How many people are there?")

    Each question is answered from the same state: it does not see the questions and answers before
    it.  Nothing is merged for a question, and what it adds to the cache is removed before the next
    one.  When the `Llama` was used otherwise in between, by another context for example, the state
    is put back from a copy in memory, which is as large as the merged cache.

    Parameters
    ----------
    llama : Llama
        The model.
    messages : sequence
        What all questions are about.
    options : dict
        Options of `Llama.create_chat_completion` for all questions.

    Attributes
    ----------
    turns : Turns
        Those of the model: entering and asking are one call each, as others of it.
    """

    def __init__(self, llama: Model, messages: Sequence[Any], options: dict[str, Any]) -> None:
        self._llama = llama
        self.turns = llama.turns
        self._messages = check_messages(messages)
        self._given = options
        self._options = self._request({}).options
        self._chat: _Chat = _chat_of(llama)
        self._base: Snapshot | None = None
        self._joins = False
        self._asked = 0

    @takes_turn
    def __enter__(self) -> Context:
        self._llama.check_media(self._messages)
        with self._chat.start(self._messages, self._longer_chats(), self._options) as prompt:
            self._llama.read(prompt, answer=False)
        self._base = self._llama.kv_cache.snapshot()
        return self

    def __exit__(self, *_: object) -> None:
        self._base = None

    # Messages.

    def _longer_chats(self) -> list[Messages]:
        """Return chats that go on from the messages, of those that the chat template takes."""
        self._joins = False
        taken: list[Messages] = []
        refusal: Exception | None = None
        for role, text in _ANY_MESSAGE:
            message = [{"role": role, "content": text}]
            try:
                taken.append(self._taken(self._followed_by(message)))
            except ValueError as error:
                refusal = error
                if not taken and not self._joins and role == self._messages[-1].get("role"):
                    # It wants roles to alternate: what is asked is a part of the last message.
                    self._joins = True
                    taken.append(self._taken(self._followed_by(message)))
        if not taken:
            raise OptionError(f"the chat template takes no question here: {refusal}") from refusal
        return taken

    def _taken(self, messages: Messages) -> Messages:
        self._chat.check(messages, self._options)
        return messages

    def _followed_by(self, messages: Messages) -> Messages:
        last, first = self._messages[-1], messages[0]
        if not self._joins or last.get("role") != first.get("role"):
            return [*self._messages, *messages]
        content = [*_parts(last), *_parts(first, "\n")]
        return [*self._messages[:-1], {**last, "content": content}, *messages[1:]]

    # Asking.

    @takes_turn
    def ask(self, question: str | Sequence[Any], **options: Any) -> Any:
        """Answer a question about the messages.

        Parameters
        ----------
        question : str or messages
            What the user asks, or messages that go on from those that were read; they may show
            more pictures.
        **options
            Options of `Llama.create_chat_completion`, such as ``stream=True``.

        Returns
        -------
        dict or iterator
            What `Llama.create_chat_completion` returns.

        Raises
        ------
        StateError
            Outside the ``with`` block; or, from a stream, when the next question was asked before
            it ended.
        """
        base, llama = self._base, self._llama
        if base is None:
            raise StateError("this context is not open: ask inside its `with` block")
        if not question:
            raise OptionError("the question is empty: pass a text or messages")
        if isinstance(question, str):
            question = [{"role": "user", "content": question}]
        messages = self._followed_by(check_messages(question))
        llama.check_media(messages)
        request = self._request(options)
        self._asked += 1
        self._return_to(base)
        answer = self._answer(base, messages, request.options)
        answer = request.shape(answer, llama.usage)
        if not request.options["stream"]:
            return answer
        return self.turns.stream(self._until_next(answer))

    def _request(self, options: dict[str, Any]) -> Request:
        chat_format = self._llama.chat_format if self._llama.chat_handler is None else None
        request = Request.chat([], self._given | options, chat_format)
        return replace(request, options=_DEFAULTS | request.options)

    def _return_to(self, base: Snapshot) -> None:
        cache = self._llama.kv_cache
        if not (cache.begins_with(base) and cache.trim(len(base.tokens))):
            log.info(
                "the cache no longer holds the %d tokens of the context: putting them back from "
                "memory",
                len(base.tokens),
            )
            cache.restore(base)

    def _answer(self, base: Snapshot, messages: Messages, options: dict[str, Any]) -> Any:
        llama = self._llama
        with self._chat.prompt(messages, options) as prompt:
            n = len(base.tokens)
            if prompt.tokens[:n] == base.tokens.tolist():
                tokens = prompt.tokens
                llama.read(prompt, merge=False)
                return self._chat.answer(tokens, messages, options)
        log.info(
            "the chat template writes the %d tokens of the context in another way before this "
            "question: reading all again",
            n,
        )
        return llama.create_chat_completion(messages, **options)

    def _until_next(self, chunks: Iterator[Any]) -> Iterator[Any]:
        """Pass a stream on until the next question, which takes the cache from it."""
        asked = self._asked
        with closing(chunks):  # type: ignore[type-var]
            while True:
                if asked != self._asked:
                    raise StateError(
                        "the next question was asked before this stream ended: read a stream to "
                        "its end first"
                    )
                try:
                    chunk = next(chunks)
                except StopIteration:
                    return
                yield chunk


def _parts(message: Any, before: str = "") -> list[Any]:
    """Return the content of a message as parts, with text before it."""
    content = message.get("content") or ""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    return [{"type": "text", "text": before}, *parts] if before else parts


# How chats become tokens: by the handler of this package, or by a chat format of llama-cpp-python.


class _Chat(Protocol):
    def check(self, messages: Messages, options: dict[str, Any]) -> None:
        """Raise a ValueError if the chat template does not take the messages."""

    def start(self, messages: Messages, chats: list[Messages], options: dict[str, Any]) -> Any:
        """Return a block with the prompt that is common to all chats, which begin with messages."""

    def prompt(self, messages: Messages, options: dict[str, Any]) -> Any:
        """Return a block with the prompt of a chat."""

    def answer(self, tokens: list[int], messages: Messages, options: dict[str, Any]) -> Any:
        """Answer a chat whose prompt was read."""


def _chat_of(llama: Model) -> _Chat:
    handler = llama.chat_handler
    if handler is None:
        return _TextChat(llama)
    if isinstance(handler, ChatHandler):
        return _MediaChat(llama, handler)
    raise UnsupportedError(
        f"{type(handler).__name__} reads a chat from its beginning in every call: for context() "
        "pass the vision part as mmproj= instead of chat_handler="
    )


def chat_tokens(llama: Model, messages: Messages, options: dict[str, Any]) -> Prompt:
    """Return the prompt of a chat, of which nothing can be read: only its tokens are known."""
    handler = llama.chat_handler
    if isinstance(handler, ChatHandler):
        text = handler.text(llama, messages, options)
        media = find_media(messages, llama.settings.media_access)
        with handler.prompt(text, media, is_read=False) as prompt:
            return prompt
    with _chat_of(llama).prompt(messages, options) as prompt:
        return prompt


class _MediaChat:
    """Chats with pictures; those of the context are prepared once."""

    def __init__(self, llama: Model, handler: ChatHandler) -> None:
        self._llama = llama
        self._handler = handler

    def check(self, messages: Messages, options: dict[str, Any]) -> None:
        self._handler.text(self._llama, messages, options)

    @contextmanager
    def start(
        self, messages: Messages, chats: list[Messages], options: dict[str, Any]
    ) -> Iterator[Prompt]:
        media = find_media(messages, self._llama.settings.media_access)
        first, *others = [self._handler.text(self._llama, chat, options) for chat in chats]
        with self._handler.prompt(first, media) as prompt:
            tokens = [prompt.tokens]
            for text in others:
                with self._handler.prompt(text, media, is_read=False) as other:
                    tokens.append(other.tokens)
            yield prompt.beginning(len(os.path.commonprefix(tokens)))

    @contextmanager
    def prompt(self, messages: Messages, options: dict[str, Any]) -> Iterator[Prompt]:
        media = find_media(messages, self._llama.settings.media_access)
        text = self._handler.text(self._llama, messages, options)
        with self._handler.prompt(text, media) as prompt:
            yield prompt

    def answer(self, tokens: list[int], messages: Messages, options: dict[str, Any]) -> Any:
        return self._handler.answer(self._llama, tokens, messages, **options)


class _TextChat:
    """Chats of text only: a chat format is asked what it would read."""

    def __init__(self, llama: Model) -> None:
        self._llama = llama
        self._handler: TextHandler = llama.text_handler()

    def check(self, messages: Messages, options: dict[str, Any]) -> None:
        self._handler.tokens(self._llama, messages, options)

    @contextmanager
    def start(
        self, messages: Messages, chats: list[Messages], options: dict[str, Any]
    ) -> Iterator[Prompt]:
        tokens = [self._handler.tokens(self._llama, chat, options) for chat in chats]
        yield Prompt.from_tokens(os.path.commonprefix(tokens))

    @contextmanager
    def prompt(self, messages: Messages, options: dict[str, Any]) -> Iterator[Prompt]:
        yield Prompt.from_tokens(self._handler.tokens(self._llama, messages, options))

    def answer(self, tokens: list[int], messages: Messages, options: dict[str, Any]) -> Any:
        return self._llama.create_chat_completion(messages, **options)
