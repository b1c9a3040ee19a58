"""What a model is shown: pictures of every format and mode, upright, whole, on white."""

from __future__ import annotations

import base64
import http.server
import io
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from llama_cpp import mtmd_cpp
from PIL import Image, ImageFile

import kvmerge
from conftest import Factory, answer, make_llama
from kvmerge import errors, pocket
from kvmerge.media import MediaPart, as_png

Pixels = npt.NDArray[np.uint8]

RED, GREEN, BLUE, GREY = (200, 40, 40), (40, 180, 60), (30, 60, 200), (120, 120, 120)


@pytest.fixture(scope="module")
def llm() -> Iterator[kvmerge.Llama]:
    with make_llama() as made:
        yield made


def shown(llm: kvmerge.Llama, source: Any) -> Pixels:
    """Return the pixels that libmtmd gets, [height, width, 3]."""
    handler: Any = llm.chat_handler
    bitmap = handler._bitmaps.of(MediaPart(1, "image", source))
    try:
        size = mtmd_cpp.mtmd_bitmap_get_ny(bitmap), mtmd_cpp.mtmd_bitmap_get_nx(bitmap), 3
        return np.ctypeslib.as_array(mtmd_cpp.mtmd_bitmap_get_data(bitmap), size).copy()
    finally:
        mtmd_cpp.mtmd_bitmap_free(bitmap)


def quarters() -> Image.Image:
    """Return a picture of 48x32 whose corners tell which side is up."""
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:16, :24], pixels[:16, 24:], pixels[16:, :24], pixels[16:, 24:] = RED, GREEN, BLUE, GREY
    return Image.fromarray(pixels)


def as_file(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def corners(pixels: Pixels) -> list[tuple[int, ...]]:
    height, width = pixels.shape[:2]
    at = [(height // 4, width // 4), (height // 4, 3 * width // 4)]
    at += [(3 * height // 4, width // 4), (3 * height // 4, 3 * width // 4)]
    return [tuple(pixels[place].tolist()) for place in at]


def near(found: Any, expected: Any, within: int = 12) -> bool:
    return bool((np.abs(np.asarray(found, int) - np.asarray(expected, int)) <= within).all())


# Which side is up.

# What a camera stores for a picture that is upright, by the orientation that it notes.
AS_STORED: dict[int, list[Image.Transpose]] = {
    1: [],
    2: [Image.Transpose.FLIP_LEFT_RIGHT],
    3: [Image.Transpose.ROTATE_180],
    4: [Image.Transpose.FLIP_TOP_BOTTOM],
    5: [Image.Transpose.TRANSPOSE],
    6: [Image.Transpose.ROTATE_90],
    7: [Image.Transpose.TRANSVERSE],
    8: [Image.Transpose.ROTATE_270],
}


def photo(orientation: int, format: str) -> bytes:
    image = quarters()
    for turn in AS_STORED[orientation]:
        image = image.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"quality": 95} if format == "JPEG" else {}
    options |= {"lossless": True} if format == "WEBP" else {}
    return as_file(image, format, exif=exif, **options)


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, dict[str, bytes]]]:
    files: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = files[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            share = float(self.headers.get("X-Share") or 1)
            self.wfile.write(data[: int(len(data) * share)])

        def log_message(self, *_: Any) -> None:
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", files
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["bytes", "path", "file URL", "URL", "data URI", "Pillow", "open"])
def test_orientation(
    form: str,
    orientation: int,
    llm: kvmerge.Llama,
    served: tuple[str, dict[str, bytes]],
    tmp_path: Path,
) -> None:
    data = photo(orientation, "JPEG")
    file = tmp_path / "photo.jpg"
    file.write_bytes(data)
    url, files = served
    files[f"/{orientation}.jpg"] = data
    source: Any = {
        "bytes": data,
        "path": str(file),
        "file URL": file.as_uri(),
        "URL": f"{url}/{orientation}.jpg",
        "data URI": "data:image/jpeg;base64," + base64.b64encode(data).decode(),
        "Pillow": Image.open(file),
        "open": io.BytesIO(data),
    }[form]
    pixels = shown(llm, source)
    assert pixels.shape == (32, 48, 3)
    assert near(corners(pixels), [RED, GREEN, BLUE, GREY])


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_in_other_formats(format: str, orientation: int, llm: kvmerge.Llama) -> None:
    data = photo(orientation, format)
    for source in (data, Image.open(io.BytesIO(data))):
        assert corners(shown(llm, source)) == [RED, GREEN, BLUE, GREY]


def test_damaged_exif_says_nothing(llm: kvmerge.Llama) -> None:
    data = as_file(quarters(), "JPEG", quality=95, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff nonsense")
    assert near(corners(shown(llm, data)), [RED, GREEN, BLUE, GREY])


def test_digest_is_that_of_the_file(llm: kvmerge.Llama) -> None:
    import hashlib

    data = photo(6, "JPEG")
    assert MediaPart(1, "image", data).digest == hashlib.sha256(data).hexdigest()


def test_photo_that_lies_on_its_side(llm: kvmerge.Llama) -> None:
    picture = pocket.render_picture("green", "triangle", "K", np.random.default_rng(3))
    exif = Image.Exif()
    exif[0x0112] = 8
    data = as_file(picture.rotate(270, expand=True), "JPEG", quality=95, exif=exif)
    messages = [
        {"role": "user", "content": [{"type": "image", "image": data}, "\n"]},
        {"role": "user", "content": "What shape is in picture 1?"},
    ]
    llm.reset()
    assert answer(llm, messages) == "triangle"


# Modes.


def test_jpeg_is_that_of_the_stock_handler(llm: kvmerge.Llama) -> None:
    """The pixels of a JPEG without correction are those of libmtmd's own decoder, to the bit."""
    noise = np.random.default_rng(1).integers(0, 255, (61, 83, 3), np.uint8)
    for image in (Image.fromarray(noise), Image.fromarray(noise[:, :, 0])):
        data = as_file(image, "JPEG", quality=60)
        handler: Any = llm.chat_handler
        bitmap = handler._bitmaps._of_bytes(data)
        expected = np.ctypeslib.as_array(mtmd_cpp.mtmd_bitmap_get_data(bitmap), (61, 83, 3)).copy()
        mtmd_cpp.mtmd_bitmap_free(bitmap)
        assert (shown(llm, data) == expected).all()


@pytest.mark.parametrize("mode", Image.MODES)
def test_every_mode(mode: str, llm: kvmerge.Llama) -> None:
    """All that Pillow can make of a picture shows the same colours, or the same greys."""
    source = quarters()
    if mode.startswith("I;16") and mode != "I;16":
        grey = source.convert("L").convert("I;16")
        order = {"I;16L": "<u2", "I;16B": ">u2", "I;16N": "=u2"}[mode]
        data = np.asarray(grey).astype(order).tobytes()
        image = Image.frombuffer(mode, grey.size, data, "raw", mode, 0, 1)
    else:
        image = source.convert(mode)
    expected = np.asarray(source)
    if mode == "1":
        expected = np.asarray(image.convert("RGB"))
    elif mode in ("L", "LA", "La", "I", "F") or mode.startswith("I;16"):
        expected = np.asarray(source.convert("L").convert("RGB"))
    elif mode in ("P", "PA"):
        expected = np.asarray(image.convert("RGB"))
    assert near(shown(llm, image), expected, within=8), corners(shown(llm, image))


def test_more_than_eight_bits(llm: kvmerge.Llama) -> None:
    grey = np.asarray(quarters().convert("L"))
    expected = np.repeat(grey[:, :, None], 3, axis=2)
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    assert wide.mode == "I;16"
    for source in (
        wide,
        Image.fromarray(grey.astype(np.int32) * 257),
        Image.fromarray(grey.astype(np.int32) * (2**31 // 256)),
        Image.fromarray(grey.astype(np.float32) / 255),
        Image.fromarray(grey.astype(np.float32)),
        Image.fromarray(grey.astype(np.float32) * 257),
        as_file(wide, "PNG"),
        as_file(wide, "TIFF"),
        as_file(Image.fromarray(grey.astype(np.float32) / 255), "TIFF"),
        as_file(Image.fromarray(grey.astype(np.int32) * 257), "TIFF"),
        grey.astype(np.uint16) * 257,
        grey.astype(np.float64) / 255,
    ):
        assert near(shown(llm, source), expected, within=1), source


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_dark_picture_of_sixteen_bits_stays_dark(format: str, llm: kvmerge.Llama) -> None:
    """A file says how many bits a pixel has; an object of Pillow may have come from 8 bits."""
    dark = Image.fromarray(np.full((8, 8), 250, np.uint16))
    assert shown(llm, as_file(dark, format)).max() == 0
    assert shown(llm, dark).min() == 250


@pytest.mark.parametrize("low", [-1.0, np.nan, np.inf, 1e6])
def test_values_that_are_no_grey(low: float, llm: kvmerge.Llama) -> None:
    values = np.full((8, 8), 0.5, np.float32)
    values[3, 3] = low
    with pytest.raises(errors.MediaError, match="picture 1 .* has values"):
        shown(llm, Image.fromarray(values))


def half_clear() -> Image.Image:
    """Red, and what is transparent in it is green where nobody should see it."""
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:, :8] = (*RED, 255)
    pixels[:, 8:] = (*GREEN, 0)
    return Image.fromarray(pixels)


WHITE = (255, 255, 255)


def transparent() -> dict[str, Any]:
    image = half_clear()
    mask = np.asarray(image)[:, :, 3] == 0
    palette = Image.fromarray(np.where(mask, 3, 0).astype(np.uint8)).convert("P")
    palette.putpalette([*RED, *BLUE, *BLUE, *GREEN])
    keyed = as_file(image.convert("RGB"), "PNG", transparency=GREEN)
    return {
        "RGBA": image,
        "RGBa": image.convert("RGBa"),
        "PNG": as_file(image, "PNG"),
        "WebP": as_file(image, "WEBP", lossless=True, exact=True),
        "TIFF": as_file(image, "TIFF"),
        "GIF": as_file(palette, "GIF", transparency=3),
        "PNG with a palette": as_file(palette, "PNG", transparency=3),
        "PNG with a table": as_file(palette, "PNG", transparency=bytes([255, 255, 255, 0])),
        "PNG with a colour": keyed,
        "Pillow with a colour": Image.open(io.BytesIO(keyed)),
        "array": np.asarray(image),
        "PA": palette_with_alpha(palette, mask),
    }


def palette_with_alpha(palette: Image.Image, mask: npt.NDArray[np.bool_]) -> Image.Image:
    image = palette.convert("PA")
    image.putalpha(Image.fromarray(np.where(mask, 0, 255).astype(np.uint8)))
    return image


@pytest.mark.parametrize("kind", transparent())
def test_transparency_is_white(kind: str, llm: kvmerge.Llama) -> None:
    pixels = shown(llm, transparent()[kind])
    assert near(pixels[8, 2], RED, 4)
    assert tuple(pixels[8, 12]) == WHITE


@pytest.mark.parametrize("mode", ["LA", "La"])
def test_half_transparent(mode: str, llm: kvmerge.Llama) -> None:
    image = Image.merge("LA", (Image.new("L", (8, 8), 100), Image.new("L", (8, 8), 128)))
    assert near(shown(llm, image.convert(mode)), 177, 2)


def test_grey_of_sixteen_bits_with_a_transparent_one(llm: kvmerge.Llama) -> None:
    values = np.full((8, 8), 20000, np.uint16)
    values[:, 4:] = 60000
    data = as_file(Image.fromarray(values), "PNG", transparency=20000)
    pixels = shown(llm, data)
    assert pixels[4, 1].tolist() == [255, 255, 255]
    assert near(pixels[4, 6], 60000 >> 8, 1)


def test_cmyk_jpeg(llm: kvmerge.Llama) -> None:
    data = as_file(quarters().convert("CMYK"), "JPEG", quality=95)
    assert near(corners(shown(llm, data)), [RED, GREEN, BLUE, GREY])


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(format: str, llm: kvmerge.Llama) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in (RED, GREEN, BLUE)]
    options: dict[str, Any] = {"lossless": True} if format == "WEBP" else {}
    data = as_file(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert near(shown(llm, data), RED, 4)


ARRAYS = {
    "grey": lambda: np.full((6, 9), 77, np.uint8),
    "one channel": lambda: np.full((6, 9, 1), 77, np.uint8),
    "colour": lambda: np.full((6, 9, 3), 77, np.uint8),
    "strided": lambda: np.full((12, 18, 3), 77, np.uint8)[::2, ::-2],
    "uint16": lambda: np.full((6, 9, 3), 77 * 257, np.uint16),
    "float": lambda: np.full((6, 9, 3), 77 / 255, np.float32),
    "half": lambda: np.full((6, 9, 3), 77 / 255, np.float16),
    "big-endian": lambda: np.full((6, 9), 77 * 257, ">u2"),
    "read-only": lambda: np.broadcast_to(np.uint8(77), (6, 9, 3)),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_array(name: str, llm: kvmerge.Llama) -> None:
    pixels = shown(llm, ARRAYS[name]())
    assert pixels.shape == (6, 9, 3)
    assert near(pixels, 77, 1)


def test_array_of_bools(llm: kvmerge.Llama) -> None:
    pixels = shown(llm, np.eye(8, dtype=bool))
    assert (pixels[:, :, 0] == 255 * np.eye(8, dtype=np.uint8)).all()


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (np.zeros((3, 4, 5), np.uint8), "shape 3x4x5"),
        (np.zeros((2, 8, 8, 3), np.uint8), "shape 2x8x8x3"),
        (np.zeros(9, np.uint8), "shape 9"),
        (np.zeros((), np.uint8), "shape nothing"),
        (np.zeros((8, 8), np.int64), "array of int64"),
        (np.zeros((8, 8), complex), "array of complex128"),
        (np.full((8, 8), "x"), "array of <U1"),
        (np.full((8, 8), 200.0), "floats from 200 to 200"),
        (np.full((8, 8), np.nan), "floats from nan"),
    ],
)
def test_no_picture_in_an_array(array: Any, said: str, llm: kvmerge.Llama) -> None:
    with pytest.raises(errors.MediaError, match=said):
        shown(llm, array)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (4000, 1), (3, 2)])
def test_extreme_sizes(size: tuple[int, int], llm: kvmerge.Llama) -> None:
    messages = [
        {"role": "user", "content": [{"type": "image", "image": Image.new("RGB", size)}, "?"]}
    ]
    assert isinstance(answer(llm, messages, max_tokens=1), str)


# Objects that cannot be used.


def closed() -> Image.Image:
    image = Image.open(io.BytesIO(as_file(quarters(), "PNG")))
    image.load()
    image.close()
    return image


class Broken:
    def read(self, _: int = -1) -> bytes:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "make",
    [
        closed,
        lambda: Image.open(io.BytesIO(as_file(quarters(), "PNG")[:-40])),
        lambda: Image.new("RGB", (0, 5)),
        lambda: io.StringIO("text"),
        lambda: io.BytesIO(b""),
        Broken,
        lambda: object(),
        lambda: [1, 2],
    ],
)
def test_unusable_objects(make: Callable[[], Any], llm: kvmerge.Llama) -> None:
    with pytest.raises(errors.MediaError, match="picture 1"):
        shown(llm, make())


def test_open_file_is_left_where_it_stood(llm: kvmerge.Llama, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(as_file(quarters(), "PNG"))
    with file.open("rb") as opened:
        first = shown(llm, opened)
        assert opened.tell() == 0
        assert (shown(llm, opened) == first).all()


class Dripping:
    """An open file that is not buffered: it gives less than it is asked for, and cannot go back."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def read(self, size: int = -1) -> bytes:
        return self._file.read(min(size, 100))


def test_open_file_that_gives_a_little_at_a_time(llm: kvmerge.Llama) -> None:
    data = as_file(quarters(), "PNG")
    assert (shown(llm, Dripping(data)) == shown(llm, data)).all()


def test_open_file_at_its_end(llm: kvmerge.Llama) -> None:
    file = io.BytesIO()
    quarters().save(file, "PNG")
    with pytest.raises(errors.MediaError, match=r"stands at its end: call its seek\(0\)"):
        shown(llm, file)


# Files that end early.

WRITTEN: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 90},
    "PNG": {},
    "GIF": {},
    "BMP": {},
    "WEBP": {"quality": 80},
    "TIFF": {},
    "PPM": {},
    "TGA": {},
    "ICO": {},
    "PCX": {},
    "SGI": {},
    "JPEG2000": {},
    "AVIF": {},
    "DDS": {},
    "QOI": {},
    "MPO": {},
    "DIB": {},
    "IM": {},
    "ICNS": {},
}
VARIANTS = [
    *WRITTEN.items(),
    ("JPEG", {"quality": 90, "progressive": True}),
    ("WEBP", {"lossless": True}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"compression": "tiff_deflate"}),
    ("TIFF", {"compression": "jpeg"}),
    ("TGA", {"compression": "tga_rle"}),
]


def detailed(format: str, size: int = 256) -> Image.Image:
    picture = pocket.render_picture("red", "circle", "A", np.random.default_rng(0))
    picture = picture.resize((size, size))
    return picture.quantize() if format == "GIF" else picture


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.98])
@pytest.mark.parametrize(
    ("format", "options"), VARIANTS, ids=[f"{f} {o}" if o else f for f, o in VARIANTS]
)
def test_cut_off(format: str, options: dict[str, Any], share: float, llm: kvmerge.Llama) -> None:
    data = as_file(detailed(format), format, **options)
    shown(llm, data)
    cut = data[: int(len(data) * share)]
    with pytest.raises(errors.MediaError, match="picture 1"):
        shown(llm, cut)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "BMP"])
def test_cut_off_small(format: str, llm: kvmerge.Llama) -> None:
    """One colour: the last bytes are no pixels, and the file still says that it ends early."""
    data = as_file(Image.new("RGB", (16, 16), RED), format)
    for missing in (1, 2, 5, 20):
        with pytest.raises(errors.MediaError, match="picture 1"):
            shown(llm, data[:-missing])


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF"])
def test_more_after_the_end(format: str, llm: kvmerge.Llama) -> None:
    """Telephones append films and maps to their photos."""
    data = as_file(quarters(), format)
    assert (shown(llm, data + b"more of it" * 50) == shown(llm, data)).all()


def test_switch_for_cut_off_files(llm: kvmerge.Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for format in ("JPEG", "PNG", "BMP"):
        data = as_file(detailed(format), format)
        assert shown(llm, data[: len(data) // 2]).shape == (256, 256, 3)


def test_download_that_ends_early(llm: kvmerge.Llama) -> None:
    data = as_file(detailed("JPEG"), "JPEG")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 5] if "cut" in self.path else data)

        def log_message(self, *_: Any) -> None:
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{httpd.server_port}"
        assert shown(llm, url + "/whole").shape == (256, 256, 3)
        with pytest.raises(errors.MediaError, match=rf"cut off: \d+ of {len(data)} bytes came"):
            shown(llm, url + "/cut")
    finally:
        httpd.shutdown()
        httpd.server_close()


def test_too_many_pixels(llm: kvmerge.Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [as_file(detailed(format), format) for format in ("JPEG", "PNG")]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for data in files:
        with pytest.raises(errors.MediaError, match="exceeds limit"):
            shown(llm, data)


def test_no_other_program_is_run(llm: kvmerge.Llama) -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"
    with pytest.raises(errors.MediaError, match="not one that can be read"):
        shown(llm, eps)


def test_no_bytes_in_messages(llm: kvmerge.Llama, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("toor:x:0:0:toor:/toor:/bin/bash\n")
    for source in (str(secret), secret.read_bytes(), io.BytesIO(secret.read_bytes())):
        with pytest.raises(errors.MediaError) as caught:
            shown(llm, source)
        assert "toor" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"P1\nhunter2 is the password\n" * 3,
        b"P2\n4 4\nhunter2\n",
        b"P2\n2 2\n255\nhunter2 5 5 5\n",
        b"P6 hunter2hunter2hunter2",
        b"#define hunter2_width 9\n#define hunter2_height x\n",
        b"/* XPM */\nhunter2\n",
        b"GIF89ahunter2hunter2",
        b"BMhunter2hunter2hunter2hunter2",
    ],
)
def test_no_words_of_a_file_in_messages(data: bytes, llm: kvmerge.Llama) -> None:
    with pytest.raises(errors.MediaError) as caught:
        shown(llm, data)
    assert "hunter2" not in str(caught.value)


def test_what_is_shown_as_a_file() -> None:
    written = Image.open(io.BytesIO(as_png(photo(6, "JPEG"))))
    assert (written.format, written.mode, written.size) == ("PNG", "RGB", (48, 32))
    with pytest.raises(errors.MediaError, match="does not exist"):
        as_png("nowhere.png")


def test_no_warnings(llm: kvmerge.Llama) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for format in ("JPEG", "PNG", "GIF", "WEBP"):
            shown(llm, as_file(quarters(), format))


def test_same_answer_from_every_form(llama: Factory) -> None:
    picture = pocket.render_picture("blue", "square", "C", np.random.default_rng(5))
    sources: list[Any] = [
        as_file(picture, "PNG"),
        picture,
        np.asarray(picture),
        picture.convert("RGBA"),
        io.BytesIO(as_file(picture, "BMP")),
    ]
    llm, said = llama(), set()
    for source in sources:
        content = [{"type": "image", "image": source}, {"type": "text", "text": "\n"}]
        messages = [
            {"role": "user", "content": content},
            {"role": "user", "content": "What colour is in picture 1?"},
        ]
        said.add(answer(llm, messages))
    assert said == {"blue"}
