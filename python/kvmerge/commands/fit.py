"""``kvmerge fit``: what will be resident, and how many pictures fit, before anything is loaded."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .number import MOST_TOKENS, Whole, amount, cap, kept, shown
from .picture_options import MOST_OF_A_PICTURE

if TYPE_CHECKING:
    from ..budget import Budget
    from ..cap import Cap
    from ..estimate.dry_load import ContextOptions, DryModel
    from ..estimate.memory import Fit, Footprint, Reading, Vision
    from ..policies import Policy

_SIZE = re.compile(r"(\d{1,9})[xX×](\d{1,9})")
_LARGEST_SIDE = 65536
_MOST_LAYERS = 100_000
_ROWS = {
    "process": "Python and libraries",
    "weights": "weights",
    "repacked": "weights, repacked",
    "mmproj": "mmproj",
    "vocabulary": "vocabulary, lists of weights",
    "kv": "KV cache",
    "queries": "observed queries",
    "records": "records of merged cells",
    "compute": "compute buffers",
    "graphs": "graphs, scratch",
    "encoder": "vision encoder, at its peak",
    "total": "total",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="model (GGUF)")
    parser.add_argument("--mmproj", type=Path, help="vision part of the model (GGUF)")
    parser.add_argument(
        "--images",
        type=Whole(1, MOST_TOKENS),
        help="pictures; default: 1 with --mmproj, else text only",
    )
    parser.add_argument(
        "--size", type=_size, default=(1024, 768), help="their size in pixels, WIDTHxHEIGHT"
    )
    parser.add_argument(
        "--image-tokens",
        type=Whole(1, MOST_TOKENS),
        help="tokens of a picture; default: as libmtmd counts them",
    )
    for name in ("--image-min-tokens", "--image-max-tokens"):
        parser.add_argument(name, type=Whole(1, MOST_OF_A_PICTURE), help="as in kvmerge.Llama")
    parser.add_argument(
        "--text-tokens",
        type=Whole(0, MOST_TOKENS),
        default=256,
        help="tokens of text beside them (256)",
    )
    parser.add_argument("--ctx", type=Whole(1, MOST_TOKENS), default=32768, help="n_ctx (32768)")
    for name in ("--n-batch", "--n-ubatch"):
        parser.add_argument(
            name, type=Whole(1, MOST_TOKENS), default=512, help="as in kvmerge.Llama (512)"
        )
    parser.add_argument(
        "--n-gpu-layers",
        type=Whole(-1, _MOST_LAYERS, "-1 is all"),
        default=0,
        help="as in kvmerge.Llama (0)",
    )
    parser.add_argument("--type-k", default="f16", help="type of the cache's keys (f16)")
    parser.add_argument("--type-v", default="f16", help="type of the cache's values (f16)")
    parser.add_argument("--flash-attn", action="store_true", help="with fused attention")
    parser.add_argument("--kv-merge", default="auto", help="how the cache is merged (auto)")
    parser.add_argument(
        "--kv-budget",
        type=kept,
        default=0.2,
        help="what is kept: a fraction such as 0.2, or a number of cells",
    )
    parser.add_argument(
        "--kv-max-cells",
        type=cap,
        help="the most cells that the cache may have, or an amount such as 512MiB",
    )
    parser.add_argument("--memory", type=_Amount, help="say how many pictures fit, such as 8GiB")
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes")


def _size(text: str) -> tuple[int, int]:
    match = _SIZE.fullmatch(text.strip())
    sides = (int(match[1]), int(match[2])) if match else (0, 0)
    if not all(1 <= side <= _LARGEST_SIDE for side in sides):
        raise argparse.ArgumentTypeError(
            f"must be WIDTHxHEIGHT in pixels, each from 1 to {_LARGEST_SIDE}, such as 1024x768, "
            f"not {shown(text)}"
        )
    return sides


class _Amount:
    """An amount of memory, as it was written and in bytes."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.bytes = amount(text)


@dataclass(frozen=True)
class _Picture:
    """Tokens of one picture, and what is known about the encoder."""

    tokens: int
    encoder: int | None
    note: str = ""


def run(arguments: argparse.Namespace) -> int:
    """Print the table, or JSON."""
    from ..budget import Budget
    from ..estimate.dry_load import DryModel
    from ..estimate.memory import Estimate, Reading, Vision
    from ..policies import resolve
    from ..resident import resident

    _check(arguments)
    width, height = arguments.size
    budget = Budget(arguments.kv_budget)
    policy = resolve(arguments.kv_merge)
    assert policy is not None  # a name always means one
    options = _options(arguments)
    if arguments.mmproj is not None:
        _load_pillow()
    process = resident()

    with DryModel(arguments.model, arguments.n_gpu_layers) as model:
        picture, vision = _Picture(0, 0), Vision()
        if arguments.mmproj is not None:
            picture, vision = _vision(arguments, model, width, height)
        elif arguments.image_tokens is not None:
            picture = _Picture(arguments.image_tokens, 0)
        images = _images(arguments)
        reading = Reading(images, picture.tokens, arguments.text_tokens)
        max_cells = _max_cells(arguments.kv_max_cells, model, options)
        estimate = Estimate(model, options, vision, policy, budget, max_cells, process)
        fit = estimate.fit(reading)
        within = None
        longest, trained = estimate.longest_context, model.trained_context
        if arguments.memory is not None and picture.tokens:
            within = estimate.images_within(arguments.memory.bytes, reading)

    if arguments.json:
        print(json.dumps(_plain(arguments, reading, fit, vision, within), indent=2))
    else:
        _print(arguments, reading, fit, vision, _kept(policy, budget))
        for line in _notes(arguments, reading, fit, picture.note, trained):
            print(f"\n{line}")
        if within is not None:
            _print_within(arguments.memory.text, longest, within)
    return 0


def _load_pillow() -> None:
    """Load what reading a first picture loads: all of Pillow's formats."""
    from PIL import Image, ImageOps  # noqa: F401

    Image.init()


# Options.


def _check(arguments: argparse.Namespace) -> None:
    from ..errors import OptionError

    low, high = arguments.image_min_tokens, arguments.image_max_tokens
    if low is not None and high is not None and low > high:
        raise OptionError(f"--image-min-tokens {low} is more than --image-max-tokens {high}")
    if arguments.mmproj is None:
        if low is not None or high is not None:
            raise OptionError("--image-min-tokens and --image-max-tokens need --mmproj")
        if arguments.images is not None and arguments.image_tokens is None:
            raise OptionError("--images needs --mmproj, or --image-tokens for each")


def _options(arguments: argparse.Namespace) -> ContextOptions:
    from ..cache_types import CACHE_TYPES
    from ..errors import OptionError, did_you_mean
    from ..estimate.dry_load import ContextOptions

    types = {}
    for name in ("type_k", "type_v"):
        value = getattr(arguments, name).lower()
        if value not in CACHE_TYPES:
            raise OptionError(
                f"--{name.replace('_', '-')} {value!r} is not a cache type: it must be one of "
                f"{', '.join(CACHE_TYPES)}.{did_you_mean(value, CACHE_TYPES)}"
            )
        types[name] = CACHE_TYPES[value]
    if arguments.type_v.lower() not in ("f32", "f16", "bf16") and not arguments.flash_attn:
        raise OptionError(f"--type-v {arguments.type_v} needs --flash-attn")
    return ContextOptions(
        n_ctx=arguments.ctx,
        n_batch=arguments.n_batch,
        n_ubatch=arguments.n_ubatch,
        flash_attn=arguments.flash_attn,
        **types,
    )


def _images(arguments: argparse.Namespace) -> int:
    if arguments.images is not None:
        return int(arguments.images)
    return 0 if arguments.mmproj is None and arguments.image_tokens is None else 1


def _max_cells(cap: Cap | None, model: DryModel, options: ContextOptions) -> int | None:
    if cap is None:
        return None
    one, two = (model.context(options, cells) for cells in (256, 512))
    return cap.cells((two.kv - one.kv) / 256)


# The vision part.


def _vision(
    arguments: argparse.Namespace, model: DryModel, width: int, height: int
) -> tuple[_Picture, Vision]:
    from ..errors import LibraryError, ProjectorError
    from ..estimate.memory import Vision
    from ..estimate.projector_size import DryProjector, EncoderPeak, ImageBounds

    bounds = ImageBounds(arguments.image_min_tokens, arguments.image_max_tokens)
    projector = DryProjector(arguments.mmproj, bounds)
    peak: EncoderPeak | None = None
    note = ""
    try:
        peak = projector.encoder_peak(arguments.flash_attn)
    except (LibraryError, ProjectorError) as error:
        note = f"The vision encoder is not counted: {error}"
    encoder, graphs = (None, 0) if peak is None else (peak.size, peak.graphs)
    if arguments.image_tokens is not None:
        return _Picture(arguments.image_tokens, encoder, note), Vision(
            projector.weights, encoder, graphs
        )

    sizes = [(width, height)]
    if peak is not None and peak.side:
        sizes.append((peak.side, peak.side))
    picture, *laid_out = projector.image_tokens(model, sizes)
    if peak is not None and laid_out and picture.piece > laid_out[0].piece:
        # Buffers grow with the tokens; they were laid out for fewer.
        encoder = round(peak.size * picture.piece / laid_out[0].piece)
        note = (
            "The vision encoder is estimated: llama.cpp lays it out for pictures of "
            f"{peak.side}x{peak.side}, and larger ones take more."
        )
    return _Picture(picture.total, encoder, note), Vision(projector.weights, encoder, graphs)


# Output.


def _kept(policy: Policy, budget: Budget) -> str:
    if policy.budget_of == "media":
        return f"all text and {str(budget).replace('the tokens', 'what is not text')}"
    return str(budget)


def _print(
    arguments: argparse.Namespace,
    reading: Reading,
    fit: Fit,
    vision: Vision,
    kept: str,
) -> None:
    what = f"{reading.text_tokens} tokens of text"
    if reading.images:
        size = (
            " of {}x{}".format(*arguments.size)
            if arguments.mmproj and not arguments.image_tokens
            else ""
        )
        plural = "s" if reading.images > 1 else ""
        pictures = f"{reading.images} picture{plural}{size}"
        what = f"{pictures} ({reading.image_tokens} tokens each), {what}"
    print(f"{arguments.model.name}: {what}")
    print(f"{reading.tokens} of {arguments.ctx} tokens, {arguments.kv_merge}, {kept}\n")

    columns: dict[str, Footprint] = {"full cache": fit.full}
    if fit.merged is not None and fit.peak is not None:
        columns |= {"merged": fit.merged, "while reading": fit.peak}
    print(f"{'MiB':<28}" + "".join(f"{name:>15}" for name in columns))
    for name, label in _ROWS.items():
        if name == "encoder" and vision.encoder is None:
            print(f"{label:<28}" + f"{'unknown':>15}" * len(columns))
            continue
        values = [getattr(column, name) / 2**20 for column in columns.values()]
        if any(values):
            print(f"{label:<28}" + "".join(f"{value:>15.1f}" for value in values))
    for name, label in (("held", "cells held"), ("cells", "cells allocated")):
        print(f"{label:<28}" + "".join(f"{getattr(c, name):>15}" for c in columns.values()))


def _print_within(memory: str, longest: int, within: dict[str, int]) -> None:
    labels = {
        "full": "full cache",
        "merged": "merged, read in one prompt",
        "merged_in_turns": "merged, read one a turn",
    }
    print(f"\nPictures that fit into {memory}, with n_ctx as needed, up to {longest}:")
    for name, count in within.items():
        print(f"  {labels[name]:<28}{count:>8}")


def _notes(
    arguments: argparse.Namespace, reading: Reading, fit: Fit, note: str, trained: int
) -> list[str]:
    notes = [note] if note else []
    if arguments.ctx > trained:
        notes.append(f"The model was trained for a context of {trained}, not {arguments.ctx}.")
    if reading.tokens > arguments.ctx:
        images = 0
        if reading.image_tokens:
            images = max(0, arguments.ctx - reading.text_tokens) // reading.image_tokens
        fitting = f": {images} of these pictures fit" if reading.images else ""
        notes.append(
            f"These are more tokens than --ctx {arguments.ctx} takes{fitting}. "
            f"Make it at least {reading.tokens}."
        )
    if fit.refusal:
        notes.append(f"This model cannot be merged: {fit.refusal}")
    return notes


def _plain(
    arguments: argparse.Namespace,
    reading: Reading,
    fit: Fit,
    vision: Vision,
    within: dict[str, int] | None,
) -> dict[str, Any]:
    def column(footprint: Footprint | None) -> dict[str, int | None] | None:
        if footprint is None:
            return None
        encoder = {"encoder": None} if vision.encoder is None else {}
        return {**asdict(footprint), **encoder, "total": footprint.total}

    return {
        "n_ctx": arguments.ctx,
        "images": reading.images,
        "image_tokens": reading.image_tokens,
        "tokens": reading.tokens,
        "fits_context": reading.tokens <= arguments.ctx,
        "full": column(fit.full),
        "merged": column(fit.merged),
        "while_reading": column(fit.peak),
        "cannot_merge": fit.refusal or None,
        "images_within_memory": within,
    }
