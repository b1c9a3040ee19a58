"""What an mmproj takes, and how many tokens it makes of a picture, without loading its weights.

The tokens are counted by libmtmd itself: it is given an outline of the mmproj (its metadata, with
weights cut down to nothing) and a picture that has a size and no pixels.  So the count follows
every projector that it knows, with slices and the marks around them.
"""

from __future__ import annotations

import ctypes
import os
import re
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LibraryError, ProjectorError
from ..gguf_file import check_gguf
from ..native.library import library_file
from ..native.loading import load
from ..native.log import INFO, NativeLog, caught
from ..resident import resident
from .dry_load import DryModel, logged_compute
from .gguf_outline import GgufHeader

_WARM_UP = re.compile(r"warmup with image size = (\d+) x (\d+)")
# clip_init() is C++; its parameters and its result are plain C structs.
_CLIP_INIT = "_Z9clip_initPKc19clip_context_params"
_CLIP_FREE = "_Z9clip_freeP8clip_ctx"


class _ClipParams(ctypes.Structure):
    _fields_ = [
        ("use_gpu", ctypes.c_bool),
        ("device", ctypes.c_void_p),
        ("flash_attn_type", ctypes.c_int),
        ("image_min_tokens", ctypes.c_int),
        ("image_max_tokens", ctypes.c_int),
        ("warmup", ctypes.c_bool),
        ("cb_eval", ctypes.c_void_p),
        ("cb_eval_user_data", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
        ("progress_callback", ctypes.c_void_p),
        ("progress_callback_user_data", ctypes.c_void_p),
    ]


class _ClipContexts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("vision", "audio", "audio_generation")]


@dataclass(frozen=True)
class ImageBounds:
    """Bounds on the tokens of a picture; None leaves them to the mmproj."""

    low: int | None = None
    high: int | None = None


@dataclass(frozen=True)
class ImageTokens:
    """Tokens of one picture, marks included, and of the largest piece that is encoded at once."""

    total: int
    piece: int


@dataclass(frozen=True)
class EncoderPeak:
    """Compute buffers of the encoder, in bytes.

    ``side`` is that of the square picture that they were laid out for, ``graphs`` is what
    laying them out took by itself.
    """

    size: int
    side: int
    graphs: int


class DryProjector:
    """An mmproj of which only the metadata is loaded.

    Parameters
    ----------
    path : path
        The mmproj (GGUF).
    bounds : ImageBounds
        Bounds on the tokens of a picture.

    Raises
    ------
    ProjectorError
        If it is missing, not a GGUF, damaged, or not an mmproj.
    """

    def __init__(self, path: str | os.PathLike[str], bounds: ImageBounds | None = None) -> None:
        load()
        self.path = check_gguf(path, "mmproj", ProjectorError)
        self._bounds = bounds or ImageBounds()
        with self._header() as header:
            architecture = header.text("general.architecture")
            if architecture != "clip":
                raise ProjectorError(
                    f"{self.path} is not an mmproj: its general.architecture is "
                    f"{architecture or 'missing'!r}, that of an mmproj is 'clip'"
                )
            self.weights = header.weights
            self.kind = header.text("clip.projector_type") or header.text(
                "clip.vision.projector_type"
            )

    def _header(self) -> GgufHeader:
        return GgufHeader(self.path, "mmproj", ProjectorError)

    def image_tokens(self, model: DryModel, sizes: list[tuple[int, int]]) -> list[ImageTokens]:
        """Return the tokens of pictures of some sizes, in pixels.

        Raises
        ------
        ProjectorError
            If libmtmd does not know this projector, or it is not for this model.
        """
        from llama_cpp import mtmd_cpp

        if not model.has_vocabulary:
            raise ProjectorError(
                f"{model.path} has no vocabulary, so the marks around a picture cannot be counted: "
                "give the tokens of a picture yourself (--image-tokens)"
            )
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvmerge-")))
            outline = folder / "outline.gguf"
            with self._header() as header:
                header.write_outline(outline)
            params = mtmd_cpp.mtmd_context_params_default()
            params.use_gpu = params.print_timings = params.warmup = False
            params.n_threads = 1
            params.image_min_tokens = self._bounds.low or -1
            params.image_max_tokens = self._bounds.high or -1
            with caught(quiet=True) as errors:
                context = mtmd_cpp.mtmd_init_from_file(os.fsencode(outline), model.pointer, params)
            if context is None:
                reason = errors.reason.replace(str(outline), str(self.path))
                raise ProjectorError(
                    f"the tokens of a picture cannot be counted for the mmproj {self.path} "
                    f"(projector {self.kind or 'not named'!r}): {reason or 'no reason was given'}. "
                    "Give them yourself (--image-tokens)"
                )
            stack.callback(mtmd_cpp.mtmd_free, context)
            if not mtmd_cpp.mtmd_support_vision(context):
                raise ProjectorError(f"the mmproj {self.path} takes no pictures")
            return [self._count(context, *size) for size in sizes]

    def _count(self, context: Any, width: int, height: int) -> ImageTokens:
        from llama_cpp import mtmd_cpp

        with ExitStack() as stack:
            bitmap = mtmd_cpp.mtmd_bitmap_init(width, height, None)
            stack.callback(mtmd_cpp.mtmd_bitmap_free, bitmap)
            chunks = mtmd_cpp.mtmd_input_chunks_init()
            stack.callback(mtmd_cpp.mtmd_input_chunks_free, chunks)
            marker = mtmd_cpp.mtmd_default_marker()
            text = mtmd_cpp.mtmd_input_text(marker, len(marker), False, True)
            bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap)
            with caught(quiet=True) as errors:
                status = mtmd_cpp.mtmd_tokenize(context, chunks, ctypes.byref(text), bitmaps, 1)
            if status != 0:
                raise ProjectorError(
                    f"libmtmd could not count the tokens of a picture of {width}x{height}: "
                    f"{errors.reason or f'status {status}'}"
                )
            total, piece = 0, 0
            for i in range(mtmd_cpp.mtmd_input_chunks_size(chunks)):
                chunk = mtmd_cpp.mtmd_input_chunks_get(chunks, i)
                n_tokens = int(mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk))
                total += n_tokens
                kind = mtmd_cpp.mtmd_input_chunk_get_type(chunk)
                if kind == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                    piece = max(piece, n_tokens)
            return ImageTokens(total, piece)

    def encoder_peak(self, flash_attn: bool) -> EncoderPeak:
        """Return the compute buffers that are laid out when the mmproj is loaded.

        Raises
        ------
        LibraryError
            If the library does not export what is needed for that.
        ProjectorError
            If libmtmd cannot lay it out.
        """
        library = ctypes.CDLL(str(library_file("mtmd")))
        try:
            clip_init, clip_free = getattr(library, _CLIP_INIT), getattr(library, _CLIP_FREE)
        except AttributeError as error:
            raise LibraryError(f"libmtmd does not export clip_init ({error})") from error
        clip_init.restype, clip_init.argtypes = _ClipContexts, [ctypes.c_char_p, _ClipParams]
        clip_free.restype, clip_free.argtypes = None, [ctypes.c_void_p]
        params = _ClipParams(
            use_gpu=True,
            flash_attn_type=int(flash_attn),
            image_min_tokens=self._bounds.low or -1,
            image_max_tokens=self._bounds.high or -1,
            warmup=True,
            no_alloc=True,
        )
        before = resident()
        with caught() as errors, caught(INFO, quiet=True) as log:
            contexts = clip_init(os.fsencode(self.path), params)
        if not contexts.vision:
            raise ProjectorError(f"the mmproj {self.path} cannot be laid out: {errors.reason}")
        graphs = max(0, resident() - before)
        for name, _ in _ClipContexts._fields_:
            clip_free(getattr(contexts, name))
        return EncoderPeak(logged_compute(log), _warm_up_side(log), graphs)


def _warm_up_side(log: NativeLog) -> int:
    """Return the side of the picture that the encoder was laid out for."""
    found = [match for line in log if (match := _WARM_UP.search(line))]
    return int(found[0][1]) if found else 0
