"""Turn what a message shows, in whatever form, into the red, green and blue that a model sees."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile

_RUNS_PROGRAMS = frozenset({"EPS"})
"""Formats that Pillow hands to another program."""

_RANGES = {
    "I;16": (255, 65535),
    "I": (255, 65535, 2**31 - 1),
    "F": (1, 255, 65535),
}
"""What white may be in modes of more than 8 bits: the first that no value exceeds.

Such pictures do not say what white is, and Pillow itself makes all of these.
"""

_SAY_SIXTEEN_BITS = (("PNG", "I"), ("PNG", "I;16"), ("TIFF", "I;16"), ("JPEG2000", "I;16"))
"""Files, with their mode, in which white is 65535, however dark the picture is."""

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How to turn a picture upright, by its EXIF orientation."""

_ON_ITS_SIDE = (5, 6, 7, 8)
"""EXIF orientations in which rows are columns."""

_CLEAR_COLOUR = ("1", "L", "P", "RGB")
"""Modes in which Pillow knows one colour, or a table, that is transparent."""

_REASON = 200


class PictureError(Exception):
    """Why something cannot be used as a picture."""


def picture_of(source: bytes | Image.Image | npt.NDArray[Any]) -> Image.Image:
    """Return a picture as a model sees it.

    Parameters
    ----------
    source : bytes, PIL.Image.Image or numpy.ndarray
        A file of any format that Pillow opens; of an animation the first frame is taken. Arrays
        are [height, width] or [height, width, 1, 3 or 4] of bool, uint8, uint16, or floats from 0
        to 1.

    Returns
    -------
    PIL.Image.Image
        In mode RGB, upright, without transparency: what shows through is white.

    Raises
    ------
    PictureError
        If it is damaged, cut off, empty, or no picture.
    """
    if isinstance(source, np.ndarray):
        return _on_white(_of_array(source))
    try:
        image = source if isinstance(source, Image.Image) else open_file(source)
        if 0 in image.size:
            raise PictureError(f"has no pixels: its size is {image.width}x{image.height}")
        image.load()
        turn = _TURNS.get(_orientation(image))
        image = _on_white(image)
        image = image if turn is None else image.transpose(turn)
        image.info = {}  # What it says of the file, such as its orientation, no longer holds.
        return image
    except PictureError:
        raise
    except Exception as error:  # Pillow's plug-ins raise whatever they like.
        raise _unreadable(error, isinstance(source, bytes)) from error


def is_jpeg_as_it_is(data: bytes) -> bool:
    """Return whether a file is a JPEG whose pixels need no correction, and check that it is whole.

    libmtmd reads such a file by itself as well, to other last bits than Pillow: used as it is, the
    model sees exactly what it does in llama-cpp-python.

    Raises
    ------
    PictureError
        If it is damaged or cut off.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return False
    try:
        image = open_file(data)
        if image.format not in ("JPEG", "MPO") or image.mode not in ("L", "RGB"):
            return False
        if _orientation(image) != 1 or 0 in image.size:
            return False
        # All of the file is decoded, at an eighth of its size, which is quick.
        image.draft("L", (1, 1))
        image.load()
    except PictureError:
        raise
    except Exception as error:
        raise _unreadable(error, True) from error
    return True


def size_of(data: bytes) -> tuple[int, int]:
    """Return width and height of a picture as a model sees it, without decoding the file.

    Raises
    ------
    PictureError
        If it is no picture, or ends before its end.
    """
    try:
        image = open_file(data)
        width, height = image.size
        turn = _orientation(image)
    except PictureError:
        raise
    except Exception as error:  # Pillow's plug-ins raise whatever they like.
        raise _unreadable(error, True) from error
    if 0 in (width, height):
        raise PictureError(f"has no pixels: its size is {width}x{height}")
    return (height, width) if turn in _ON_ITS_SIDE else (width, height)


def open_file(data: bytes) -> Image.Image:
    """Return the first picture of a file, which need not be decoded yet.

    Raises
    ------
    PictureError
        If it is no picture, or ends before its end.
    """
    Image.init()
    formats = [name for name in Image.OPEN if name not in _RUNS_PROGRAMS]
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError as error:
        raise _unreadable(error, True) from error
    except Exception as error:
        raise PictureError("is not one that can be read") from error
    if not ImageFile.LOAD_TRUNCATED_IMAGES and _is_cut_off(image.format or "", data):
        raise PictureError(f"is cut off: the {image.format} file ends after {len(data)} bytes")
    return image


def _unreadable(error: Exception, is_file: bool) -> PictureError:
    """Return Pillow's reason; not where it could quote what is in a file."""
    if is_file and not isinstance(error, (OSError, Image.DecompressionBombError)):
        return PictureError("cannot be read: the file is damaged")
    words = str(error) or type(error).__name__
    return PictureError(
        f"cannot be read: {words if len(words) <= _REASON else words[: _REASON - 1] + '…'}"
    )


# Files that end early. Pillow's decoders see most of them; some formats also say where they end.


def _is_cut_off(format: str, data: bytes) -> bool:
    if format in ("JPEG", "MPO"):
        return not _has_end_of_jpeg(data)
    if format == "PNG":
        return b"IEND\xaeB`\x82" not in data
    if format == "GIF":
        return not _has_end_of_gif(data)
    if format == "WEBP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    if format == "ICNS":
        return len(data) < int.from_bytes(data[4:8], "big")
    if format == "BMP":
        return len(data) < int.from_bytes(data[2:6], "little")
    if format in ("AVIF", "JPEG2000"):
        return not _has_whole_boxes(data)
    return False


def _has_end_of_jpeg(data: bytes) -> bool:
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            at += 1
        elif data[at + 1] == 0xDA:  # What is compressed follows; in it FF is always followed by 0.
            return b"\xff\xd9" in data[at:]
        elif data[at + 1] in (0x00, 0x01, 0xFF) or 0xD0 <= data[at + 1] <= 0xD8:
            at += 1 if data[at + 1] == 0xFF else 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def _has_end_of_gif(data: bytes) -> bool:
    def table(flags: int) -> int:
        return 3 << (1 + (flags & 7)) if flags & 0x80 else 0

    if len(data) < 13:
        return False
    at = 13 + table(data[10])
    while at < len(data):
        kind = data[at]
        if kind == 0x3B:
            return True
        if kind == 0x21:
            at += 2
        elif kind == 0x2C and at + 9 < len(data):
            at += 11 + table(data[at + 9])
        else:
            return kind not in (0x2C, 0x21)  # Something else follows the last frame.
        while at < len(data) and data[at]:
            at += 1 + data[at]
        at += 1
    return False


def _has_whole_boxes(data: bytes) -> bool:
    """Return whether the boxes of an ISO base media file are all there."""
    if data.startswith(b"\xff\x4f"):  # A bare JPEG 2000 code stream ends with a marker.
        return data.rstrip(b"\0").endswith(b"\xff\xd9")
    at = 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1 and at + 16 <= len(data):
            size = struct.unpack(">Q", data[at + 8 : at + 16])[0]
        if size == 0:  # Up to the end of the file.
            return True
        if size < 8:
            return False
        at += size
    return at <= len(data)


# Pixels.


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Damaged EXIF says nothing about the picture.
        return 1


def _on_white(image: Image.Image) -> Image.Image:
    """Return a picture in RGB, what is transparent on white, as browsers show it."""
    clear = image.info.get("transparency")
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        scaled = _eight_bit(image)
        if isinstance(clear, int):
            scaled.paste(255, mask=Image.fromarray(np.asarray(image) == clear))
        return scaled.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode not in ("LA", "PA", "RGBA", "RGBa") and (
        clear is None or image.mode not in _CLEAR_COLOUR
    ):
        return image.convert("RGB")
    image = image.convert("RGBA")
    if image.getextrema()[3] == (255, 255):
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    mode = "I;16" if image.mode.startswith("I;16") else image.mode
    ranges = (65535,) if (image.format, mode) in _SAY_SIXTEEN_BITS else _RANGES[mode]
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)) or low < 0:
        raise PictureError(f"has values from {low:g} to {high:g}, where 0 is black")
    for white in ranges:
        if high <= white:
            break
    else:
        raise PictureError(f"has values up to {high:g}, where white is 1, 255 or 65535")
    if white == 65535 and mode != "F":
        return Image.fromarray((values >> 8).astype(np.uint8))  # as libmtmd reads 16-bit PNG
    return Image.fromarray(np.rint(values * (255.0 / white)).astype(np.uint8))


def _of_array(array: npt.NDArray[Any]) -> Image.Image:
    shape = "x".join(map(str, array.shape))
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise PictureError(
            f"is an array of shape {shape or 'nothing'}: pictures are [height, width], or [height, "
            "width, 3 or 4]"
        )
    if array.size == 0:
        raise PictureError(f"has no pixels: its shape is {shape}")
    if array.dtype == np.bool_:
        array = array * np.uint8(255)
    elif array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):
            raise PictureError(
                f"is an array of floats from {array.min():g} to {array.max():g}: they must be from "
                "0 to 1"
            )
        array = np.rint(array.astype(np.float64) * 255).astype(np.uint8)
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:
        array = (array >> 8 if array.max() > 255 else array).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise PictureError(
            f"is an array of {array.dtype}: it must be bool, uint8, uint16, or floats from 0 to 1"
        )
    return Image.fromarray(np.ascontiguousarray(array))
