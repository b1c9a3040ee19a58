"""Memory and decoding speed of layers that differ in size, against layers of one size.

A prompt is merged to the same number of cells in all: the same for every layer (``snapkv``),
falling with depth (``pyramid``), and the same pyramid in a cache of fixed size, where every layer
stores the cells of the widest one. They generate in turns, and what is measured is the CPU's time,
so that a busy machine changes little.

    python benchmarks/layer_budgets.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

MIB = 1024 * 1024
TOKENS, CELLS, GENERATED = 2048, 500, 16


def main() -> None:
    """Print one table with flash attention and one without."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()

    from needed_packages import need

    need("gguf")
    import numpy as np

    from kvmerge.policies import PRESETS
    from random_model import Shape, write_random_model
    from session import Session

    # layers that are quick to compute beside their attention
    shape = Shape(layers=8, heads=8, heads_kv=8, ffn=256)
    prompt = np.random.default_rng(5).integers(0, shape.vocab, TOKENS).tolist()
    rows = {
        "snapkv: all layers alike": ("snapkv", 256),
        "pyramid, each layer its own": ("pyramid", 256),
        "pyramid, all as the widest": ("pyramid", 0),
    }
    with tempfile.TemporaryDirectory() as folder:
        model = write_random_model(Path(folder) / "model.gguf", shape)
        for flash_attention in (True, False):
            sessions, speeds, sizes = {}, {name: [] for name in rows}, {}
            for name, (policy, first_cells) in rows.items():
                session = sessions[name] = Session(
                    model,
                    merge=PRESETS[policy].engine_params(),
                    n_ctx=TOKENS + 256,
                    n_batch=256,
                    first_cells=first_cells,
                    flash_attention=flash_attention,
                    threads=1,
                )
                for start in range(0, TOKENS, 256):
                    session.decode(prompt[start : start + 256])
                session.engine.merge(CELLS)
                session.decode([1])
                sizes[name] = [session.engine.layer_bytes(i) / MIB for i in range(shape.layers)]
            for _ in range(args.rounds):
                for name, session in sessions.items():
                    start = time.process_time()
                    for token in range(GENERATED):
                        session.decode([token])
                    speeds[name].append(GENERATED / (time.process_time() - start))
                    assert session.remove(TOKENS + 1, -1)
                    session.position = TOKENS + 1
            held = {name: session.engine.n_cells() for name, session in sessions.items()}
            for session in sessions.values():
                session.__exit__(None, None, None)
            print(f"\n{TOKENS} tokens in {CELLS} cells a layer, {shape.layers} layers, "
                  f"flash attention {'on' if flash_attention else 'off'}\n")  # fmt: skip
            print("| | widest layer | MiB | first and last layer | tokens per CPU second |")
            print("|---|---:|---:|---:|---:|")
            for name, size in sizes.items():
                # a cache of fixed size has n_ctx cells: what counts is the widest layer
                widest = max(sizes["pyramid, each layer its own"])
                each = size if rows[name][1] else [widest] * len(size)
                print(f"| {name} | {held[name] - 1} | {sum(each):.1f} | {each[0]:.2f}, "
                      f"{each[-1]:.2f} | {statistics.median(speeds[name]):.1f} |")  # fmt: skip


if __name__ == "__main__":
    main()
