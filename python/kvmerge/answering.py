"""llama-cpp-python's calls that read and answer, over a cache that may merge."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp.llama import Llama as StockLlama

from .cache import KVCache
from .chat.grammar import check_grammar
from .chat.messages import check_messages, check_text
from .chat.request import Request
from .errors import (
    DecodeError,
    KVMergeError,
    MediaError,
    OptionError,
    StateError,
    UnsupportedError,
)
from .prompt import Prompt
from .reading import PromptReader
from .sampling import Processors, plain, with_bias
from .turns import Stream, Turns, looks, takes_turn

if TYPE_CHECKING:
    from llama_cpp.llama_types import (
        CreateChatCompletionResponse,
        CreateChatCompletionStreamResponse,
        CreateCompletionResponse,
        CreateCompletionStreamResponse,
    )
    from typing_extensions import Unpack

    from .chat.call_options import ChatOptions, CompletionOptions
    from .chat.text import TextHandler


@dataclass
class _Counted:
    """Tokens of a prompt and of its answer, which a stream of llama-cpp-python does not tell."""

    prompt: int = 0
    answer: int = 0


class AnsweringLlama(StockLlama):
    """A `llama_cpp.Llama` that reads through a `PromptReader`, into a `KVCache`.

    `kvmerge.Llama` extends it by what is asked for, loaded, freed and saved.  The attributes have
    to be there before it is loaded.

    Attributes
    ----------
    kv_cache : KVCache
        What the cache holds.
    reader : PromptReader
        What reads into it.
    turns : Turns
        Whose call it is.
    """

    kv_cache: KVCache
    reader: PromptReader
    turns: Turns

    def __init__(self, model_path: str, **options: Any) -> None:
        self._counted = _Counted()
        self._processors: Processors | None = None
        super().__init__(model_path, **options)

    # Tokens.  What of them is in the cache is noted in one place, also where the parent notes it.

    @property
    def n_tokens(self) -> int:
        """Tokens that were read."""
        return self.kv_cache.n_tokens

    @n_tokens.setter
    def n_tokens(self, n_tokens: int) -> None:
        self.kv_cache.n_tokens = n_tokens

    @property
    def input_ids(self) -> npt.NDArray[np.intc]:
        """Ids of the tokens that were read, and room for more; negative ones stand for media."""
        return self.kv_cache.ids

    @input_ids.setter
    def input_ids(self, ids: npt.NDArray[np.intc]) -> None:
        self.kv_cache.ids = ids

    @property
    def _requires_eval(self) -> bool:
        return not self.kv_cache.has_logits

    @_requires_eval.setter
    def _requires_eval(self, requires: bool) -> None:
        self.kv_cache.has_logits = not requires

    @property
    def n_batch(self) -> int:
        """The most tokens that are read at once."""
        return self.reader.n_batch

    @n_batch.setter
    def n_batch(self, n_batch: int) -> None:
        self.reader.n_batch = n_batch

    @takes_turn
    def reset(self) -> None:
        """Forget what was read."""
        super().reset()
        if not self.kv_cache.trim(0):
            self.kv_cache.clear()

    @takes_turn
    def eval(self, tokens: Sequence[int]) -> None:
        """Read tokens into the cache, after those that are there.

        Parameters
        ----------
        tokens : sequence of int
            Text tokens.

        Raises
        ------
        ContextLengthError
            If they do not fit; nothing is read then.
        """
        self.reader.eval(tokens)

    @takes_turn
    def read(self, prompt: Prompt, *, merge: bool = True, answer: bool = True) -> None:
        """Read a prompt, except for the beginning that is in the cache already, and merge.

        Parameters
        ----------
        prompt : Prompt
            The whole conversation so far.
        merge : bool
            Whether to merge when the cache holds more than its budget.
        answer : bool
            Whether tokens are to be sampled next, which needs the logits of the last token.

        Raises
        ------
        ContextLengthError
            If it does not fit into ``n_ctx``; nothing is lost then.
        """
        self.reader.read(prompt, merge=merge, answer=answer)

    # Generation.

    def generate(
        self,
        tokens: Sequence[int],
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        temp: float = 0.80,
        repeat_penalty: float = 1.0,
        reset: bool = True,
        *args: Any,
        **options: Any,
    ) -> Generator[int, Sequence[int] | None, None]:
        """Read a prompt and generate tokens; as `llama_cpp.Llama.generate`, and merging."""
        sampling = (top_k, top_p, min_p, typical_p, temp, repeat_penalty)
        return self._stream(self._generate(list(tokens), sampling, reset, *args, **options))

    @takes_turn
    def _stream(self, chunks: Iterator[Any]) -> Stream:
        return self.turns.stream(chunks)

    def _generate(
        self, tokens: list[int], sampling: tuple[Any, ...], reset: bool, *args: Any, **options: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        counted, ends = self._counted, self._ends
        counted.prompt = len(tokens)
        if not reset:
            self.eval(tokens)
            self.reader.merge()
        elif not self.reader.take_prompt(tokens):
            self.read(Prompt.from_tokens(tokens))
        # The parent finds no tokens left to read, and samples.
        generated = super().generate([], *sampling, False, *args, **options)
        sent: Sequence[int] | None = None
        with closing(generated):
            while True:
                try:
                    token = generated.send(sent)
                except StopIteration:
                    return
                counted.answer += not ends(token)
                sent = yield token
                if sent and not self._logits_all:
                    # It samples after each of them, and llama.cpp ends the process without logits.
                    raise OptionError(
                        "tokens that are sent to generate() need the logits of every token: "
                        "make the Llama with logits_all=True"
                    )

    def _ends(self, token: int) -> bool:
        return bool(llama_cpp.llama_vocab_is_eog(self._model.vocab, token))

    def _init_sampler(self, *args: Any, logits_processor: Any = None, **options: Any) -> Any:
        processors = None if logits_processor is None else Processors(logits_processor)
        self._processors = processors
        return super()._init_sampler(*args, logits_processor=processors, **options)

    def sample(self, *args: Any, **options: Any) -> int:
        """Sample a token; see `llama_cpp.Llama.sample`.

        What a logits processor raises is raised here.
        """
        token = int(super().sample(*args, **options))
        if self._processors is not None:
            self._processors.check()
        return token

    def _create_completion(self, *args: Any, **options: Any) -> Iterator[Any]:
        self.turns.check_open()
        self._counted = _Counted()
        if self.cache is not None and self.kv_cache.engine is not None:
            raise UnsupportedError(
                "set_cache() does not go with kv_merge=: it would cut saved states to what a new "
                "prompt shares, and merged cells cannot be cut. Call set_cache(None)"
            )
        try:
            for part in super()._create_completion(*args, **options):
                usage: Any = part.get("usage")
                if usage is not None:
                    usage["prompt_tokens_details"] = self._prompt_tokens_details()
                for choice in part["choices"]:
                    choice["logprobs"] = plain(choice["logprobs"])
                yield part
        except ValueError as error:
            # It counts the tokens of a text before anything of ours sees them.
            if too_long := re.match(r"Requested tokens \((\d+)\) exceed", str(error)):
                self.reader.check_length(Prompt(), int(too_long[1]))
            raise

    def _prompt_tokens_details(self) -> dict[str, int]:
        details = {"cached_tokens": self.reader.cached_tokens, "cells": self.kv_cache.held()[0]}
        for modality in ("image", "audio"):
            details[f"{modality}_tokens"] = self.kv_cache.n_media_tokens(modality)
        return details

    def usage(self) -> dict[str, Any]:
        """Return what the last completion has read and written, as OpenAI calls it."""
        counted = self._counted
        return {
            "prompt_tokens": counted.prompt,
            "completion_tokens": counted.answer,
            "total_tokens": counted.prompt + counted.answer,
            "prompt_tokens_details": self._prompt_tokens_details(),
        }

    @overload
    def create_completion(
        self,
        prompt: str | Sequence[int],
        *,
        stream: Literal[False] = False,
        **options: Unpack[CompletionOptions],
    ) -> CreateCompletionResponse: ...

    @overload
    def create_completion(
        self,
        prompt: str | Sequence[int],
        *,
        stream: Literal[True],
        **options: Unpack[CompletionOptions],
    ) -> Iterator[CreateCompletionStreamResponse]: ...

    @overload
    def create_completion(
        self,
        prompt: str | Sequence[int],
        *,
        stream: bool,
        **options: Unpack[CompletionOptions],
    ) -> CreateCompletionResponse | Iterator[CreateCompletionStreamResponse]: ...

    @takes_turn
    def create_completion(self, *args: Any, **options: Any) -> Any:
        """Complete a text; see `llama_cpp.Llama.create_completion`."""
        request = Request.completion(args, options)
        self._check_logits(request.options)
        if (grammar := request.options.get("grammar")) is not None:
            check_grammar(grammar, self._model.vocab)
        for name, value in request.options.items():
            if name != "prompt" or isinstance(value, str):
                check_text(value, name)
        answer = super().create_completion(**with_bias(request.options))
        return self._in_steps(request.shape(answer, self.usage))

    def _check_logits(self, options: dict[str, Any]) -> None:
        biases = options.get("logit_bias") or {}
        if biases and max(biases) >= self._n_vocab:
            raise OptionError(
                f"logit_bias names token {max(biases)}, and the model has {self._n_vocab}"
            )
        # False is None to a chat; 0 most likely log probabilities, of a completion, is not.
        wanted = options.get("logprobs")
        if wanted is not None and wanted is not False and not self._logits_all:
            raise OptionError("logprobs needs the logits of every token: pass logits_all=True")

    def _in_steps(self, answer: Any) -> Any:
        """Return an answer as it is, or one that streams as a stream that has the turn."""
        return self.turns.stream(answer) if isinstance(answer, Iterator) else answer

    @overload
    def create_chat_completion(
        self, messages: Any, *, stream: Literal[False] = False, **options: Unpack[ChatOptions]
    ) -> CreateChatCompletionResponse: ...

    @overload
    def create_chat_completion(
        self, messages: Any, *, stream: Literal[True], **options: Unpack[ChatOptions]
    ) -> Iterator[CreateChatCompletionStreamResponse]: ...

    @overload
    def create_chat_completion(
        self, messages: Any, *, stream: bool, **options: Unpack[ChatOptions]
    ) -> CreateChatCompletionResponse | Iterator[CreateChatCompletionStreamResponse]: ...

    @takes_turn
    def create_chat_completion(self, messages: Any, *args: Any, **options: Any) -> Any:
        """Answer a chat; see `llama_cpp.Llama.create_chat_completion`.

        A later call whose messages begin with those of the one before reads only what is new.
        """
        chat_format = None if self.chat_handler is not None else self.chat_format
        request = Request.chat([messages, *args], options, chat_format)
        options = request.options
        self._check_logits(options)
        messages = options.pop("messages")
        for name, value in options.items():
            check_text(value, name)
        answer = super().create_chat_completion(self.checked(messages), **options)
        return self._in_steps(request.shape(answer, self.usage))

    def checked(self, messages: Any) -> list[Any]:
        """Return messages in the form that the chat handler takes."""
        if self.chat_handler is None:
            self.text_handler()
        elif not hasattr(self.chat_handler, "load"):
            # Somebody else's, which may know other parts.
            check_text(messages := list(messages), "messages")
            return messages
        messages = check_messages(messages)
        self.check_media(messages)
        return messages

    def text_handler(self) -> TextHandler:
        """Return what chats of text are read with, and use it from now on."""
        from .chat.text import TextHandler

        name, handlers = str(self.chat_format), cast(dict[str, Any], self._chat_handlers)
        handlers[name] = handler = TextHandler.of(name, handlers)
        return handler

    def check_media(self, messages: list[Any]) -> None:
        """Raise if checked messages show what this model cannot see or hear."""
        if self.chat_handler is not None:
            return
        from .media.part import find_media

        if found := find_media(messages):
            raise MediaError(
                f"the messages show {len(found)} pictures or sounds, and this model was loaded "
                "without a vision part: pass mmproj= to Llama"
            )

    @takes_turn
    def embed(self, input: Any, *args: Any, **options: Any) -> Any:
        """Turn texts into vectors; see `llama_cpp.Llama.embed`. What the cache held is gone then.

        Raises
        ------
        StateError
            Without ``embedding=True``.
        OptionError
            If the input is no text or list of texts.
        """
        if not self.context_params.embeddings:
            raise StateError("embed() needs a Llama that was made with embedding=True")
        texts = [input] if isinstance(input, str) else input
        is_list = isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts)
        if not is_list or not texts:
            raise OptionError(f"embed() takes a text or a list of texts, not {texts!r:.80}")
        check_text(texts, "input")
        try:
            return super().embed(input, *args, **options)
        except KVMergeError:
            raise
        except RuntimeError as error:
            raise DecodeError(f"llama.cpp could not embed the input: {error}") from error
        finally:
            self.kv_cache.clear()

    @looks
    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Turn text, which is UTF-8, into tokens; see `llama_cpp.Llama.tokenize`."""
        return super().tokenize(text, add_bos, special)

    @looks
    def detokenize(
        self,
        tokens: list[int],
        prev_tokens: list[int] | None = None,
        special: bool = False,
    ) -> bytes:
        """Turn tokens into text; what stands for pictures is left out."""
        if prev_tokens is not None:
            prev_tokens = [token for token in prev_tokens if token >= 0]
        tokens = [token for token in tokens if token >= 0]
        return super().detokenize(tokens, prev_tokens, special)
