"""A model's chat template: from messages to the text that it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jinja2
import llama_cpp
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from ..errors import KVMergeError, OptionError
from ..model import Model
from .messages import MEDIA_TYPES, check_text, joined, warn_of_left_out

_PROBE = "a8c1e5"


@dataclass(frozen=True)
class ChatTemplate:
    """A template in Jinja.

    Attributes
    ----------
    source : str
        As it stands in the GGUF.
    bos, eos : str
        The text of these tokens; empty where the model has none.
    adds_bos, adds_eos : bool
        Whether the tokenizer adds them to a text by itself.
    """

    source: str
    bos: str = ""
    eos: str = ""
    adds_bos: bool = False
    adds_eos: bool = False

    @classmethod
    def of(cls, llama: Model, source: str) -> ChatTemplate:
        """Make the template of a model."""
        vocab = llama_cpp.llama_model_get_vocab(llama.model)
        return cls(
            source,
            token_text(llama, llama.token_bos()),
            token_text(llama, llama.token_eos()),
            bool(llama_cpp.llama_vocab_get_add_bos(vocab)),
            bool(llama_cpp.llama_vocab_get_add_eos(vocab)),
        )

    @cached_property
    def _compiled(self) -> jinja2.Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Jinja2ChatFormatter.IgnoreGenerationTags, loopcontrols],
        )
        environment.filters["tojson"] = Jinja2ChatFormatter.tojson
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateError as error:
            raise OptionError(f"the chat template of the model is broken: {error}") from error

    @cached_property
    def takes_parts(self) -> bool:
        """Whether it shows contents that are lists of parts, and not only texts."""
        return takes_parts(lambda messages: self._render(messages, {}))

    def render(
        self, messages: list[dict[str, Any]], marker: str, options: Mapping[str, Any]
    ) -> str:
        """Return the text of a chat.

        Parameters
        ----------
        messages : list of dict
            As `kvmerge.chat.messages.check_messages` returns them.
        marker : str
            What stands for a picture or sound.
        options : mapping
            Further variables of the template, such as ``tools``.

        Raises
        ------
        OptionError
            If the template does not take the messages.
        """
        check_text(dict(options), "what the chat template is given")
        if self.takes_parts:
            shown = [_with_marker(message, marker) for message in messages]
        else:
            shown = joined(messages, marker)
        text = self._render(shown, options)
        check_text(text, "the prompt")
        warn_of_left_out(messages, text, "the chat template")
        # What the tokenizer adds is not written a second time.
        if self.adds_bos and self.bos:
            text = text.removeprefix(self.bos)
        if self.adds_eos and self.eos:
            text = text.removesuffix(self.eos)
        return text

    def _render(self, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> str:
        def raise_exception(message: str) -> None:
            raise OptionError(f"the chat template refuses these messages: {message}")

        given = {
            "add_generation_prompt": True,
            "eos_token": self.eos,
            "bos_token": self.bos,
            "strftime_now": Jinja2ChatFormatter.strftime_now,
            **options,
        }
        try:
            return self._compiled.render(
                messages=messages, raise_exception=raise_exception, **given
            )
        except (KVMergeError, MemoryError):
            raise
        except Exception as error:  # A template runs operations of Python on what it is given.
            raise cannot_show(error) from error


def token_text(llama: Model, token: int) -> str:
    """Return a token as the vocabulary writes it; the empty text where the model has none (-1)."""
    if token == -1:
        return ""
    vocab = llama_cpp.llama_model_get_vocab(llama.model)
    return bytes(llama_cpp.llama_vocab_get_text(vocab, token)).decode("utf-8")


def cannot_show(error: Exception) -> OptionError:
    """Return the exception for a template that failed on messages."""
    return OptionError(f"the chat template cannot show these messages: {str(error)[:500]}")


def takes_parts(text_of: Callable[[list[dict[str, Any]]], str]) -> bool:
    """Return whether a template shows lists of parts; a chat is tried to see it."""
    try:
        text = text_of([{"role": "user", "content": [{"type": "text", "text": _PROBE}]}])
    except Exception:  # It does not even take them.
        return False
    return _PROBE in text and "'type'" not in text and '"type"' not in text


def _with_marker(message: dict[str, Any], marker: str) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        return message
    parts = [
        {"type": "text", "text": marker} if part["type"] in MEDIA_TYPES else part
        for part in content
    ]
    return {**message, "content": parts}
