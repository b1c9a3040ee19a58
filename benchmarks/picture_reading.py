"""Time to read a prompt with a picture whose tokens were merged, on models of known shapes.

Language models with random weights and the shapes of those of SmolVLM-500M and Qwen2.5-VL-3B read
one picture, of made-up embeddings, and 32 tokens of text, as `Llama` does: slice by slice, with the
rows and columns that M-RoPE wants.  Of a share of the tokens no two are alike, and each other token
is like one of these, so that ``image_merge=`` leaves that share.  It is about speed alone: the
encoder is left out, which takes as long with and without, and nothing that is said has a sense.

``of all`` is the time of the prompt, merging included, against that without ``image_merge=``;
``per token`` the same for each token that is read; ``of reading`` what merging costs against the
reading without.  Rounds go over all rows in turns, and the fastest of each counts.

    python benchmarks/picture_reading.py --busy
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from kvmerge.media.embedding_batch import Positions, decode_embeddings
from kvmerge.media.image_merge import DEFAULT_THRESHOLD, ImageMerge
from session import Session, llama_cpp

BATCH, TEXT = 512, 32
NOISE = 0.1
"""Of the length of an embedding: two of a kind have a cosine of 0.99."""


@dataclass(frozen=True)
class Model:
    """A language model's shape, and its picture: slices of rows and columns of tokens."""

    shape: dict[str, Any]
    layers: int
    slices: int
    rows: int
    columns: int
    picture: str

    @property
    def n_tokens(self) -> int:
        """Tokens of the picture."""
        return self.slices * self.rows * self.columns


MODELS = {
    "SmolVLM-500M": Model(
        {"heads": 15, "heads_kv": 5, "head_size": 64, "ffn": 2560},
        layers=32,
        slices=17,
        rows=8,
        columns=8,
        picture="2048 x 2048 pixels in 16 slices and a thumbnail",
    ),
    "Qwen2.5-VL-3B": Model(
        {"arch": "qwen2vl", "heads": 16, "heads_kv": 2, "head_size": 128, "ffn": 11008},
        layers=36,
        slices=1,
        rows=27,
        columns=36,
        picture="1008 x 756 pixels",
    ),
}

Embeddings = npt.NDArray[np.float32]


def slice_of(n_tokens: int, share: float, n_embd: int, seed: int) -> Embeddings:
    """Return embeddings of which `image_merge` leaves a share."""
    rng = np.random.default_rng(seed)
    n_kinds = max(1, round(share * n_tokens))
    kind = np.append(np.arange(n_kinds), rng.integers(0, n_kinds, n_tokens - n_kinds))
    rows = rng.standard_normal((n_kinds, n_embd))[rng.permutation(kind)]
    return (rows + NOISE * rng.standard_normal(rows.shape)).astype(np.float32)


def places(session: Session, model: Model, start: int, kept: npt.NDArray[np.intp]) -> Positions:
    """Return where the tokens of a slice lie that are read, as `picture_positions` does."""
    if not session.is_mrope:
        return np.arange(start, start + len(kept), dtype=np.int32)
    row, column = np.divmod(kept, model.columns)
    zeros = np.zeros_like(kept)
    return np.stack([zeros + start, start + row, start + column, zeros]).astype(np.int32)


@dataclass
class Reading:
    """What a prompt took: tokens, and seconds of merging and of reading."""

    tokens: int
    merge: float
    read: float

    @property
    def together(self) -> float:
        """Seconds of the whole prompt."""
        return self.merge + self.read


def read(
    session: Session,
    model: Model,
    slices: list[Embeddings],
    rule: ImageMerge | None,
    clock: Callable[[], float],
) -> Reading:
    """Read a picture and a question."""
    llama_cpp.llama_memory_clear(session.memory, True)
    found = Reading(TEXT, 0.0, 0.0)
    at = 0
    for rows in slices:
        start = clock()
        kept = np.arange(len(rows))
        if rule is not None:
            merged = rule(rows)
            rows, kept = merged.embeddings, merged.kept
        found.merge += clock() - start
        start = clock()
        positions = places(session, model, at, kept)
        assert decode_embeddings(session.context, rows, positions, BATCH) == 0
        found.read += clock() - start
        found.tokens += len(rows)
        at += max(model.rows, model.columns) if session.is_mrope else len(rows)
    start = clock()
    session.decode(list(range(TEXT)), position=at)
    found.read += clock() - start
    return found


def measure(
    name: str, model: Model, file: Path, shares: list[float], args: argparse.Namespace
) -> None:
    """Print the table of a model."""
    clock = time.process_time if args.busy else time.perf_counter
    n_slice = model.rows * model.columns
    rule = ImageMerge(DEFAULT_THRESHOLD)
    with Session(
        file,
        n_ctx=model.n_tokens + 2 * TEXT,
        n_batch=BATCH,
        threads=args.threads,
        flash_attention=args.flash_attn,
    ) as session:
        rows = [("not merged", shares[0], None), *((f"{s:.0%}", s, rule) for s in shares)]
        pictures = {
            share: [slice_of(n_slice, share, session.n_embd, seed) for seed in range(model.slices)]
            for share in shares
        }
        read(session, model, pictures[shares[0]][:1], None, clock)  # the first graph takes longer
        found: dict[str, Reading] = {}
        for _ in range(args.rounds):
            for label, share, merge in rows:
                once = read(session, model, pictures[share], merge, clock)
                best = found.setdefault(label, once)
                best.merge, best.read = min(best.merge, once.merge), min(best.read, once.read)
    whole = found["not merged"]
    print(f"\n{name}: {model.picture}, {model.n_tokens} tokens, and {TEXT} of text\n")
    print("| picture | tokens | merging ms | prompt ms | of all | per token | of reading |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for label, one in found.items():
        ratio = one.together / whole.together
        print(
            f"| {label} | {one.tokens} | {one.merge * 1e3:.1f} | {one.together * 1e3:.0f} "
            f"| {ratio:.1%} | {ratio * whole.tokens / one.tokens - 1:+.1%} "
            f"| {one.merge / whole.read:.2%} |",
            flush=True,
        )


def main() -> None:
    """Write the models and read."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help=f"default: {', '.join(MODELS)}")
    parser.add_argument("--layers", type=int, help="fewer than the model has, to be sooner done")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[1.0, 0.75, 0.5, 0.25, 0.1], metavar="SHARE"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--flash-attn", action="store_true", help="fuse attention")
    parser.add_argument("--busy", action="store_true", help="count the time of the processor")
    parser.add_argument("--quick", action="store_true", help="small pictures, one layer")
    args = parser.parse_args()
    for name in args.models:
        if name not in MODELS:
            parser.error(f"{name!r} is not one of {', '.join(MODELS)}")

    from needed_packages import need

    need("gguf")
    import gguf

    from random_model import Shape, write_random_model

    fused = ", fused attention" if args.flash_attn else ""
    print(f"Q8_0{fused}, threads: {args.threads}, the fastest of {args.rounds} rounds")
    for name in args.models or MODELS:
        model = MODELS[name]
        layers = model.layers if args.layers is None else args.layers
        if args.quick:
            layers, model = 1, replace(model, slices=1, rows=4, columns=4, picture="a small one")
        shape = Shape(**model.shape, layers=layers)
        label = f"{name}, {layers} of {model.layers} layers"
        with tempfile.TemporaryDirectory() as folder:
            file = write_random_model(
                Path(folder) / "random.gguf", shape, quantization=gguf.GGMLQuantizationType.Q8_0
            )
            measure(label, model, file, args.shares, args)


if __name__ == "__main__":
    main()
