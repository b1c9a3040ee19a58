"""Options of commands that show pictures: how many tokens of a picture are read."""

from __future__ import annotations

import argparse
from typing import Any

from .number import Whole, cosine

MOST_OF_A_PICTURE = 65536


def add_picture_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--image-merge`` and ``--image-min-tokens``."""
    parser.add_argument(
        "--image-merge",
        type=cosine,
        metavar="COSINE",
        help="tokens of a picture that are as much alike become one before they are read: a "
        "cosine above 0 and at most 1, such as 0.9; default: all are read",
    )
    parser.add_argument(
        "--image-min-tokens",
        type=Whole(1, MOST_OF_A_PICTURE),
        metavar="N",
        help="tokens that are left of a picture at least, and, for models whose pictures vary in "
        "size, that the encoder makes of it",
    )


def picture_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return them as options of `kvmerge.Llama`."""
    return {
        "image_merge": arguments.image_merge,
        "image_min_tokens": arguments.image_min_tokens,
    }


def check_picture_options(arguments: argparse.Namespace) -> None:
    """Check that there is a vision part, for a command that has none unless it is given.

    Raises
    ------
    OptionError
        If there is none, and one of the options.
    """
    from ..errors import OptionError

    if arguments.mmproj is None:
        for name, value in picture_options(arguments).items():
            if value is not None:
                raise OptionError(
                    f"--{name.replace('_', '-')} needs --mmproj, the vision part of the model"
                )
