"""Chats with pictures and sounds, on the generic multimodal handler of llama-cpp-python.

What differs from that handler: a conversation that goes on reads only what is new, a picture
counts as the tokens it takes whatever positions it advances, and every file is checked.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import secrets
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import mtmd_cpp
from llama_cpp.llama_chat_format import (
    ChatFormatterResponse,
    MTMDChatHandler,
    chat_formatter_to_chat_completion_handler,
)

from ..errors import (
    DecodeError,
    MediaError,
    ModelError,
    OptionError,
    ProjectorError,
)
from ..estimate.projector_size import DryProjector
from ..gguf_file import check_gguf, sha256_of
from ..media.embedding_batch import decode_embeddings, picture_positions
from ..media.equal_slices import EqualSlices
from ..media.image_cache import Encoded, ImageCache
from ..media.image_merge import ImageMerge, ImageMergeCounts, MergedTokens, reason_to_read_whole
from ..media.part import MediaPart, find_media
from ..model import Model
from ..native import backends
from ..native.binding import trim
from ..native.library import LLAMA_CPP_PYTHON
from ..native.log import caught
from ..native.slices import slice_pixels
from ..progress import Meter
from ..prompt import Prompt, Segment, placeholder_ids
from .bitmaps import Bitmaps, remember
from .chunks import Changed, Chunk, Chunks
from .continuation import Continuation
from .template import ChatTemplate

log = logging.getLogger("kvmerge")


class _Told:
    """Tells a meter of each batch that libmtmd has read; what it raises ends the reading."""

    def __init__(self, meter: Meter | None) -> None:
        self._meter = meter
        self._error: BaseException | None = None
        kind = mtmd_cpp.mtmd_helper_post_decode_callback
        self.callback = kind() if meter is None else kind(self._read)

    def _read(self, batch: Any, _: Any) -> int:
        assert self._meter is not None
        try:
            self._meter.read(batch.contents.n_tokens)
        except BaseException as error:  # C cannot pass it on.
            self._error = error
            return 1
        return 0

    def check(self) -> None:
        """Raise what the meter has raised."""
        if self._error is not None:
            raise self._error


class _ReadAlready:
    """What llama-cpp-python's text chat handler needs of a `Llama` whose prompt is in the cache.

    That handler turns tools, response formats and completions into chat answers; it tokenizes a
    prompt by itself, and here gets the tokens that were read.
    """

    def __init__(self, llama: Model, tokens: list[int]) -> None:
        self._llama = llama
        self._tokens = tokens
        self.verbose = llama.verbose

    def tokenize(self, *_: Any, **__: Any) -> list[int]:
        return self._tokens

    def create_completion(self, **options: Any) -> Any:
        return self._llama.create_completion(**options)


class ChatHandler(MTMDChatHandler):
    """Chat handler of a `kvmerge.Llama` with an mmproj; `Llama` makes it.

    Parameters
    ----------
    mmproj : path
        The vision or audio part (GGUF).
    image_min_tokens, image_max_tokens : int, optional
        Bounds on the tokens of a picture, for models whose pictures vary in size.
    image_cache : ImageCache, optional
        Where what was encoded is kept.
    image_merge : ImageMerge, optional
        How the tokens of a picture are merged before they are read.
    """

    def __init__(
        self,
        mmproj: str | os.PathLike[str],
        image_min_tokens: int | None = None,
        image_max_tokens: int | None = None,
        image_cache: ImageCache | None = None,
        image_merge: ImageMerge | None = None,
    ) -> None:
        file = check_gguf(mmproj, "mmproj", ProjectorError)
        super().__init__(os.fspath(file), verbose=False)
        self._image_tokens = (image_min_tokens, image_max_tokens)
        self.image_cache = ImageCache(None) if image_cache is None else image_cache
        self.image_merge = image_merge
        self.merge_counts = ImageMergeCounts()
        # Of pictures that were merged: the tokens that are read.
        self._n_merged: dict[str, int] = {}
        # At the end of the interpreter the modules may be gone before this.
        self._mtmd_free = mtmd_cpp.mtmd_free
        # A marker that no message can contain by chance or on purpose.
        self._marker = f"<__media_{secrets.token_hex(8)}__>"
        self._marker_bytes = self._marker.encode()
        self._llama: weakref.ref[Model] | None = None
        self._templates: ChatTemplate | None = None
        self._bitmaps = Bitmaps(self.clip_model_path, self.image_cache)
        self._equal_slices = EqualSlices()

    # Loading.

    def load(self, llama: Model) -> None:
        """Load the mmproj for a model.

        Raises
        ------
        ProjectorError
            If it cannot be loaded or is for another model.
        """
        self._llama = weakref.ref(llama)
        self._init_mtmd_context(llama)

    def _init_mtmd_context(self, llama_model: Model) -> None:  # type: ignore[override]
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
        with caught() as errors:
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
        self.mtmd_ctx = self._bitmaps.context = context
        llama_model.at_close(self._free)
        n_embd = int(llama_cpp.llama_model_n_embd_inp(llama_model.model))
        if self.image_merge is not None:
            self._check_merge()
        self.image_cache.set_origin(partial(_origin, Path(self.clip_model_path), params, n_embd))

    def _check_merge(self) -> None:
        """Read pictures whole, and say so, where it is not known how to merge them."""
        reason = reason_to_read_whole(
            DryProjector(self.clip_model_path).kind,
            bool(mtmd_cpp.mtmd_decode_use_non_causal(self.mtmd_ctx, None)),
        )
        if reason is not None:
            log.warning("image_merge= is left aside, pictures are read whole: %s", reason)
            self.image_merge = None

    def _free(self) -> None:
        context, self.mtmd_ctx = self.mtmd_ctx, None
        self._bitmaps.context = None
        if context is not None:
            self._mtmd_free(context)

    # From messages to a prompt.

    def _template(self, llama: Model) -> ChatTemplate:
        template = llama.metadata.get("tokenizer.chat_template")
        if not template:
            raise ModelError(
                f"{llama.model_path} has no chat template (tokenizer.chat_template), which chats "
                "with pictures need"
            )
        if self._templates is None or self._templates.source != template:
            self._templates = ChatTemplate.of(llama, template)
        return self._templates

    def text(self, llama: Model, messages: list[Any], options: Mapping[str, Any]) -> str:
        """Return the text of a chat, with a marker at the place of each medium.

        Raises
        ------
        OptionError
            If the chat template does not take the messages.
        """
        end = Continuation(messages)
        template = self._template(llama)
        text = template.render(end.marked(messages), self._marker, template_options(options))
        return end.cut(text)

    @contextmanager
    def prompt(
        self, text: str, parts: list[MediaPart], *, is_read: bool = True
    ) -> Iterator[Prompt]:
        """Tokenize a text with markers; the prompt's media live until the end of the block.

        Parameters
        ----------
        text : str
            What `text` returned.
        parts : list of MediaPart
            The media of its messages.
        is_read : bool
            Whether the prompt is to be read, and not only its tokens are asked for.

        Raises
        ------
        MediaError
            If one of the media cannot be had or read.
        """
        shown = text.count(self._marker)
        if shown != len(parts):
            raise MediaError(
                f"the chat template shows {shown} of the messages' {len(parts)} pictures and "
                "sounds: it does not take them at that place"
            )
        llama = None if self._llama is None else self._llama()
        cached = set() if llama is None else {span.digest for span in llama.kv_cache.spans}
        known = self._bitmaps

        def is_cached(digest: str) -> bool:
            return self.digest_of_slice(digest, 0) in cached

        digests = [known.digest(part, is_cached) for part in parts]
        with ExitStack() as stack:
            stack.enter_context(self.image_cache.reserving(digests))
            empty = {
                digest
                for digest, part in zip(digests, parts, strict=True)
                if (known.knows(digest, part.modality) and (not is_read or is_cached(digest)))
                or known.kept(digest, part) is not None
            }
            if not is_read:
                for digest, part in zip(digests, parts, strict=True):
                    if digest not in empty and part.modality == "image":
                        known.note_size(digest, part)
                        empty.add(digest)
            if parts:
                # The media are gone by then, and may have been large.
                stack.callback(trim)
            chunks = Chunks(
                known,
                text.encode("utf-8"),
                parts,
                digests,
                empty,
                self.digest_of_slice,
                self.decode_chunk,
            )
            stack.callback(chunks.close)
            pieces = chunks.pieces()
            self.settle([piece for piece in pieces if isinstance(piece, Chunk)], is_read)
            yield Prompt([_segment(piece) for piece in pieces])

    # Merging.

    def digest_of_slice(self, file_digest: str, number: int) -> str:
        """Return what tells a slice of a picture from others, and from itself merged otherwise."""
        name = f"{file_digest}/{number}"
        if self.image_merge is not None:
            name += f"/{self.image_merge}"
        return hashlib.sha256(name.encode()).hexdigest()

    def settle(self, media: list[Chunk], is_read: bool) -> None:
        """Note how many tokens of each picture are read, for which it is encoded and merged.

        It need not be where it is in the cache, or where nothing is to be read: then what is not
        known is the most it can be.
        """
        llama = None if self._llama is None else self._llama()
        if self.image_merge is None or llama is None:
            return
        known = {span.digest: span.end - span.start for span in llama.kv_cache.spans}
        unknown = []
        for chunk in media:
            n_tokens = known.get(chunk.digest, self._n_merged.get(chunk.digest))
            if n_tokens is not None:
                chunk.n_tokens = n_tokens
            elif chunk.modality == "image":
                unknown.append(chunk)
        if not is_read or not unknown:
            return
        with llama.reader.reporting(sum(chunk.n_tokens for chunk in unknown), unknown) as meter:
            for chunk in unknown:
                if meter is not None:
                    meter.begin(chunk)
                chunk.merged = self._merged(chunk)
                if meter is not None:
                    meter.encoded(chunk)
                chunk.n_tokens = len(chunk.merged.kept)

    def _merged(self, chunk: Chunk) -> MergedTokens:
        assert self.image_merge is not None
        merged = self.image_merge(self._encoded(chunk))
        remember(self._n_merged, chunk.digest, len(merged.kept))
        return merged

    # Reading.

    def decode_chunk(self, chunk: Chunk, position: int) -> int:
        """Encode a medium and read it into the cache; return the position after it."""
        llama = None if self._llama is None else self._llama()
        if llama is None:
            raise DecodeError("the Llama of this chat handler is gone")
        meter = llama.reader.meter
        if meter is not None:
            meter.begin(chunk)
        if self.image_merge is not None and chunk.modality == "image":
            return self._decode_merged(llama, chunk, position)
        embeddings = self._encoded(chunk)
        if meter is not None:
            meter.encoded(chunk)
        pointer, told = chunk.pointer, _Told(meter)
        at_once = llama.n_batch
        if mtmd_cpp.mtmd_decode_use_non_causal(self.mtmd_ctx, pointer):
            # Its tokens see each other only when they are read together.
            at_once = max(at_once, chunk.n_tokens)
            sizes = llama_cpp.llama_n_batch(llama.ctx), llama_cpp.llama_n_ubatch(llama.ctx)
            if chunk.n_tokens > min(sizes):
                raise OptionError(
                    f"this model reads a picture of {chunk.n_tokens} tokens at once: n_batch and "
                    f"n_ubatch must be at least {chunk.n_tokens}, not {sizes[0]} and {sizes[1]}"
                )
        after = llama_cpp.llama_pos(position)
        with caught() as errors:
            status = mtmd_cpp.mtmd_helper_decode_image_chunk(
                self.mtmd_ctx,
                llama.ctx,
                pointer,
                embeddings.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
                llama_cpp.llama_pos(position),
                llama_cpp.llama_seq_id(0),
                at_once,
                ctypes.byref(after),
                told.callback,
                None,
            )
        told.check()
        if status != 0:
            raise _unread(llama, chunk, position, errors.reason or f"status {status}")
        return int(after.value)

    def _decode_merged(self, llama: Model, chunk: Chunk, position: int) -> int:
        """Read what is left of the tokens of a picture; return the position after it."""
        merged, chunk.merged = chunk.merged, None
        if merged is None:
            merged = self._merged(chunk)
        if len(merged.kept) != chunk.n_tokens:
            raise Changed(f"a picture has {len(merged.kept)} tokens, not {chunk.n_tokens}")
        meter = llama.reader.meter
        if meter is not None:
            meter.encoded(chunk)
        if llama.engine is not None:
            llama.engine.media_weights(merged.weights)
        positions, after = picture_positions(self.mtmd_ctx, chunk.pointer, position, merged.kept)
        with caught() as errors:
            status = decode_embeddings(
                llama.ctx,
                merged.embeddings,
                positions,
                llama.n_batch,
                None if meter is None else meter.read,
            )
        if status != 0:
            raise _unread(llama, chunk, position, errors.reason or f"status {status}")
        self.merge_counts.add(chunk.n_encoded, chunk.n_tokens)
        return after

    def _encoded(self, chunk: Chunk) -> npt.NDArray[np.float32]:
        """Return the embeddings of a medium, [n_tokens, n_embd]: kept ones, or new ones."""
        name = (chunk.file_digest, chunk.number)
        kept = self.image_cache.get(name, chunk.n_encoded)
        if kept is not None:
            return kept
        pointer = chunk.filled
        encode = partial(self._encode, chunk, pointer)
        pixels = slice_pixels(pointer) if chunk.n_slices > 1 else None
        if pixels is None:
            embeddings = encode()
        else:
            embeddings = self._equal_slices.encoded(chunk.file_digest, pixels, encode)
            if chunk.number == chunk.n_slices - 1:
                self._equal_slices.clear()
        size = self._bitmaps.size(chunk.file_digest)
        self.image_cache.put(name, Encoded(chunk.modality, size, embeddings))
        return embeddings

    def _encode(self, chunk: Chunk, pointer: Any) -> npt.NDArray[np.float32]:
        with caught() as errors:
            status = mtmd_cpp.mtmd_encode_chunk(self.mtmd_ctx, pointer)
        if status != 0:
            raise DecodeError(
                f"a {chunk.modality} of {chunk.n_encoded} tokens could not be encoded: "
                f"{errors.reason or f'status {status}'}"
            )
        llama = None if self._llama is None else self._llama()
        assert llama is not None
        shape = chunk.n_encoded, int(llama_cpp.llama_model_n_embd_inp(llama.model))
        values = np.ctypeslib.as_array(mtmd_cpp.mtmd_get_output_embd(self.mtmd_ctx), shape)
        return values.copy()  # The next picture is encoded to the same place.

    def __call__(  # type: ignore[override]
        self, *, llama: Model, messages: list[Any], **options: Any
    ) -> Any:
        """Answer a chat; called by `Llama.create_chat_completion`."""
        if self.mtmd_ctx is None:
            self.load(llama)
        text = self.text(llama, messages, options)
        media = find_media(messages, llama.settings.media_access)
        try:
            tokens = self._read(llama, text, media)
        except Changed:
            self._bitmaps.forget_names()
            tokens = self._read(llama, text, media)
        return self.answer(llama, tokens, messages, **options)

    def _read(self, llama: Model, text: str, media: list[MediaPart]) -> list[int]:
        with self.prompt(text, media) as prompt:
            llama.read(prompt)
            return prompt.tokens

    def answer(self, llama: Model, tokens: list[int], messages: list[Any], **options: Any) -> Any:
        """Answer a chat whose prompt was read as these tokens."""

        def formatter(**_: Any) -> ChatFormatterResponse:
            return ChatFormatterResponse(prompt="", added_special=True)

        answer: Any = chat_formatter_to_chat_completion_handler(formatter)
        return answer(
            llama=_ReadAlready(llama, tokens),
            messages=messages,
            **{name: options[name] for name in _TOOL_OPTIONS + _ANSWER_OPTIONS if name in options},
        )


def _segment(piece: list[int] | Chunk) -> Segment:
    """Return a piece of a prompt with the ids that stand for it."""
    if isinstance(piece, Chunk):
        return Segment(placeholder_ids(piece.digest, piece.n_tokens), piece)
    return Segment(piece)


def _unread(llama: Model, chunk: Chunk, position: int, reason: str) -> DecodeError:
    """Return why a medium was not read, or raise what the engine's planner has raised."""
    if llama.engine is not None:
        llama.engine.raise_problem()
    return DecodeError(
        f"a {chunk.modality} of {chunk.n_tokens} tokens could not be read at position {position}: "
        f"{reason}"
    )


def _origin(mmproj: Path, params: Any, n_embd: int) -> dict[str, Any]:
    """Return what embeddings depend on beside the picture."""
    return {
        "llama.cpp": LLAMA_CPP_PYTHON,
        "mmproj": sha256_of(mmproj),
        "n_embd": n_embd,
        "image_min_tokens": params.image_min_tokens,
        "image_max_tokens": params.image_max_tokens,
        "flash_attn_type": params.flash_attn_type,
        "devices": [device.name for device in backends.devices()] if params.use_gpu else [],
    }


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
