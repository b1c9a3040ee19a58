"""Chats with pictures and sounds, on the generic multimodal handler of llama-cpp-python.

What differs from that handler: a conversation that goes on reads only what is new, a picture
counts as the tokens it takes whatever positions it advances, and every file is checked.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import secrets
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
import llama_cpp
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from llama_cpp import mtmd_cpp
from llama_cpp._utils import suppress_stdout_stderr
from llama_cpp.llama_chat_format import (
    ChatFormatterResponse,
    Jinja2ChatFormatter,
    MTMDChatHandler,
    chat_formatter_to_chat_completion_handler,
)

from ._binding import trim
from .errors import (
    DecodeError,
    MediaError,
    ModelError,
    OptionError,
    ProjectorError,
    UnsupportedError,
)
from .gguf_file import check_gguf
from .media import MediaPart, as_png, find_media, media_type
from .native_log import caught
from .prompt import Prompt, Segment, placeholder_ids

if TYPE_CHECKING:
    from .llama import Llama


@dataclass
class _Chunk:
    """A medium in a prompt: `kvmerge.prompt.Media` over a chunk of libmtmd."""

    handler: ChatHandler
    pointer: Any
    digest: str
    modality: str
    n_tokens: int

    def decode(self, position: int) -> int:
        return self.handler.decode_chunk(self, position)


class _ReadAlready:
    """What llama-cpp-python's text chat handler needs of a `Llama` whose prompt is in the cache.

    That handler turns tools, response formats and completions into chat answers; it tokenizes a
    prompt by itself, and here gets the tokens that were read.
    """

    def __init__(self, llama: Llama, tokens: list[int]) -> None:
        self._llama = llama
        self._tokens = tokens
        self.verbose = llama.verbose

    def tokenize(self, *_: Any, **__: Any) -> list[int]:
        return self._tokens

    def create_completion(self, **options: Any) -> Any:
        self._llama._prefilled = True
        return self._llama.create_completion(**options)


class ChatHandler(MTMDChatHandler):
    """Chat handler of a `kvmerge.Llama` with an mmproj; `Llama` makes it.

    Parameters
    ----------
    mmproj : path
        The vision or audio part (GGUF).
    image_min_tokens, image_max_tokens : int, optional
        Bounds on the tokens of a picture, for models whose pictures vary in size.
    """

    def __init__(
        self,
        mmproj: str | os.PathLike[str],
        image_min_tokens: int | None = None,
        image_max_tokens: int | None = None,
    ) -> None:
        file = check_gguf(mmproj, "mmproj", ProjectorError)
        for name, value in (
            ("image_min_tokens", image_min_tokens),
            ("image_max_tokens", image_max_tokens),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise OptionError(f"{name}={value!r}: {name} must be a whole number")
            if value is not None and value < 1:
                raise OptionError(f"{name}={value!r}: {name} must be at least 1")
        super().__init__(os.fspath(file), verbose=False)
        self._image_tokens = (image_min_tokens, image_max_tokens)
        # A marker that no message can contain by chance or on purpose.
        self._marker = f"<__media_{secrets.token_hex(8)}__>"
        self._marker_bytes = self._marker.encode()
        self._llama: weakref.ref[Llama] | None = None

    # Loading.

    def load(self, llama: Llama) -> None:
        """Load the mmproj for a model.

        Raises
        ------
        ProjectorError
            If it cannot be loaded or is for another model.
        """
        self._llama = weakref.ref(llama)
        self._init_mtmd_context(llama)

    def _init_mtmd_context(self, llama_model: Llama) -> None:  # type: ignore[override]
        if self.mtmd_ctx is not None:
            return
        self.verbose = llama_model.verbose
        params = mtmd_cpp.mtmd_context_params_default()
        params.use_gpu = self.use_gpu
        params.print_timings = self.verbose
        params.n_threads = llama_model.n_threads_batch
        params.media_marker = self._marker_bytes
        params.flash_attn_type = llama_model.context_params.flash_attn_type
        low, high = self._image_tokens
        params.image_min_tokens = -1 if low is None else low
        params.image_max_tokens = -1 if high is None else high
        with suppress_stdout_stderr(disable=self.verbose), caught() as errors:
            context = mtmd_cpp.mtmd_init_from_file(
                self.clip_model_path.encode(), llama_model.model, params
            )
        if context is None:
            raise ProjectorError(
                f"the mmproj {self.clip_model_path} cannot be used with the model "
                f"{llama_model.model_path} (n_embd {llama_model.n_embd()}): "
                f"{errors.reason or 'llama.cpp gave no reason'}. It must be the mmproj that was "
                "made for this model"
            )
        self.mtmd_ctx = context
        llama_model._stack.callback(self._free)

    def _free(self) -> None:
        context, self.mtmd_ctx = self.mtmd_ctx, None
        if context is not None:
            mtmd_cpp.mtmd_free(context)

    # From messages to a prompt.

    @staticmethod
    def _convert_content_part_for_template(part: Any, media_marker: str) -> Any:
        if media_type(part) is not None:
            return {"type": "text", "text": media_marker}
        if isinstance(part, str):
            return {"type": "text", "text": part}
        return part

    def _render(self, llama: Llama, messages: list[Any], options: dict[str, Any]) -> str:
        """Return the text of a chat, with a marker at the place of each medium."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Jinja2ChatFormatter.IgnoreGenerationTags, loopcontrols],
        )
        environment.filters["tojson"] = Jinja2ChatFormatter.tojson

        def raise_exception(message: str) -> None:
            raise OptionError(f"the chat template refuses these messages: {message}")

        template = llama.metadata.get("tokenizer.chat_template")
        if not template:
            raise ModelError(
                f"{llama.model_path} has no chat template (tokenizer.chat_template), which chats "
                "with pictures need"
            )
        try:
            return environment.from_string(template).render(
                messages=self._get_template_messages(messages, self._marker),
                add_generation_prompt=True,
                eos_token=self._piece(llama, llama.token_eos()),
                bos_token=self._piece(llama, llama.token_bos()),
                raise_exception=raise_exception,
                strftime_now=Jinja2ChatFormatter.strftime_now,
                **options,
            )
        except jinja2.TemplateError as error:
            raise OptionError(f"the chat template cannot show these messages: {error}") from error

    @staticmethod
    def _piece(llama: Llama, token: int) -> str:
        return "" if token == -1 else llama._model.token_get_text(token)

    def _bitmap(self, part: MediaPart) -> Any:
        """Return libmtmd's bitmap of a file."""
        support = (
            mtmd_cpp.mtmd_support_vision
            if part.modality == "image"
            else mtmd_cpp.mtmd_support_audio
        )
        if not support(self.mtmd_ctx):
            kind = "pictures" if part.modality == "image" else "sounds"
            raise UnsupportedError(f"{part.label}: {self.clip_model_path} does not take {kind}")
        bitmap = self._bitmap_of_bytes(part.data)
        if bitmap is None and part.modality == "image":
            png = as_png(part.data)
            bitmap = None if png is None else self._bitmap_of_bytes(png)
        if bitmap is None:
            raise part.error(f"is not one that can be read (it begins with {part.data[:8]!r})")
        if mtmd_cpp.mtmd_bitmap_is_audio(bitmap) != (part.modality == "audio"):
            mtmd_cpp.mtmd_bitmap_free(bitmap)
            raise part.error("is of the other kind: a picture given as sound or the reverse")
        mtmd_cpp.mtmd_bitmap_set_id(bitmap, part.digest.encode())
        return bitmap

    def _bitmap_of_bytes(self, data: bytes) -> Any:
        assert self.mtmd_ctx is not None
        buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        return mtmd_cpp.mtmd_helper_bitmap_init_from_buf(self.mtmd_ctx, buffer, len(data), False)

    def head(self, text: str, n_media: int) -> str:
        """Return the beginning of a text up to the end of its n-th marker."""
        pieces = text.split(self._marker, n_media)
        return text[: len(text) - len(pieces[-1])]

    @contextmanager
    def _prompt(
        self, text: str, parts: list[MediaPart], is_beginning: bool = True
    ) -> Iterator[Prompt]:
        """Tokenize a text with markers; the prompt's media live until the end of the block."""
        shown = text.count(self._marker)
        if shown != len(parts):
            raise MediaError(
                f"the chat template shows {shown} of the messages' {len(parts)} pictures and "
                "sounds: it does not take them at that place"
            )
        with ExitStack() as stack, ExitStack() as pixels:
            if parts:
                # The media are gone by then, and may have been large.
                stack.callback(trim)
            bitmaps = []
            for part in parts:
                bitmap = self._bitmap(part)
                pixels.callback(mtmd_cpp.mtmd_bitmap_free, bitmap)
                bitmaps.append(bitmap)
            chunks = mtmd_cpp.mtmd_input_chunks_init()
            if chunks is None:
                raise MemoryError("libmtmd could not allocate a prompt")
            stack.callback(mtmd_cpp.mtmd_input_chunks_free, chunks)
            encoded = text.encode("utf-8")
            source = mtmd_cpp.mtmd_input_text()
            source.text = encoded
            source.text_len = len(encoded)
            source.add_special = is_beginning
            source.parse_special = True
            array = (mtmd_cpp.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
            with caught() as errors:
                status = mtmd_cpp.mtmd_tokenize(
                    self.mtmd_ctx, chunks, ctypes.byref(source), array, len(bitmaps)
                )
            if status != 0:
                raise MediaError(
                    f"libmtmd could not prepare the prompt: {errors.reason or f'status {status}'}"
                )
            pixels.close()
            yield Prompt([self._segment(chunks, i) for i in range(self._n_chunks(chunks))])

    @staticmethod
    def _n_chunks(chunks: Any) -> int:
        return int(mtmd_cpp.mtmd_input_chunks_size(chunks))

    def _segment(self, chunks: Any, index: int) -> Segment:
        chunk = mtmd_cpp.mtmd_input_chunks_get(chunks, index)
        kind = mtmd_cpp.mtmd_input_chunk_get_type(chunk)
        if kind == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_TEXT:
            count = ctypes.c_size_t()
            tokens = mtmd_cpp.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
            return Segment([tokens[i] for i in range(count.value)])
        n_tokens = int(mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk))
        bitmap_id = mtmd_cpp.mtmd_input_chunk_get_id(chunk) or b""
        # Some models cut a picture into slices: all have its id, each is another input.
        slices = sum(
            mtmd_cpp.mtmd_input_chunk_get_id(mtmd_cpp.mtmd_input_chunks_get(chunks, i)) == bitmap_id
            for i in range(index)
            if mtmd_cpp.mtmd_input_chunk_get_type(mtmd_cpp.mtmd_input_chunks_get(chunks, i)) == kind
        )
        digest = hashlib.sha256(bitmap_id + b"/%d" % slices).hexdigest()
        modality = "image" if kind == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_IMAGE else "audio"
        media = _Chunk(self, chunk, digest, modality, n_tokens)
        return Segment(placeholder_ids(digest, n_tokens), media)

    # Reading.

    def decode_chunk(self, chunk: _Chunk, position: int) -> int:
        """Encode a medium and read it into the cache; return the position after it."""
        llama = None if self._llama is None else self._llama()
        if llama is None:
            raise DecodeError("the Llama of this chat handler is gone")
        at_once = min(chunk.n_tokens, llama.n_batch)
        if (
            mtmd_cpp.mtmd_decode_use_non_causal(self.mtmd_ctx, chunk.pointer)
            and at_once > llama.context_params.n_ubatch
        ):
            raise OptionError(
                f"this model reads a picture of {chunk.n_tokens} tokens at once: "
                f"n_batch and n_ubatch must be at least {chunk.n_tokens}, not {llama.n_batch} and "
                f"{llama.context_params.n_ubatch}"
            )
        after = llama_cpp.llama_pos(position)
        with caught() as errors:
            status = mtmd_cpp.mtmd_helper_eval_chunk_single(
                self.mtmd_ctx,
                llama.ctx,
                chunk.pointer,
                llama_cpp.llama_pos(position),
                llama_cpp.llama_seq_id(0),
                llama.n_batch,
                False,
                ctypes.byref(after),
            )
        if status != 0:
            raise DecodeError(
                f"a {chunk.modality} of {chunk.n_tokens} tokens could not be read at position "
                f"{position}: {errors.reason or f'status {status}'}"
            )
        return int(after.value)

    def __call__(  # type: ignore[override]
        self, *, llama: Llama, messages: list[Any], **options: Any
    ) -> Any:
        """Answer a chat; called by `Llama.create_chat_completion`."""
        if self.mtmd_ctx is None:
            self.load(llama)
        text = self._render(llama, messages, template_options(options))
        with self._prompt(text, find_media(messages)) as prompt:
            tokens = prompt.tokens
            llama.read(prompt)
        return self.answer(llama, tokens, messages, **options)

    def answer(self, llama: Llama, tokens: list[int], messages: list[Any], **options: Any) -> Any:
        """Answer a chat whose prompt was read as these tokens."""

        def formatter(**_: Any) -> ChatFormatterResponse:
            return ChatFormatterResponse(prompt="", added_special=True)

        answer: Any = chat_formatter_to_chat_completion_handler(formatter)
        return answer(
            llama=_ReadAlready(llama, tokens),
            messages=messages,
            **{name: options[name] for name in _TOOL_OPTIONS + _ANSWER_OPTIONS if name in options},
        )


def template_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a chat's options that its template sees."""
    return {name: value for name, value in options.items() if name not in _ANSWER_OPTIONS}


_TOOL_OPTIONS = ("functions", "function_call", "tools", "tool_choice")
_ANSWER_OPTIONS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "stream",
    "stop",
    "seed",
    "response_format",
    "max_tokens",
    "presence_penalty",
    "frequency_penalty",
    "repeat_penalty",
    "tfs_z",
    "mirostat_mode",
    "mirostat_tau",
    "mirostat_eta",
    "model",
    "logits_processor",
    "grammar",
    "logit_bias",
    "logprobs",
    "top_logprobs",
)
