"""What scoring, matching and folding cost against the time of reading the prompt.

A prompt of 4096 tokens, text and pictures in turns, is merged to a fifth by every preset; `auto`
keeps all of the text and a fifth of the pictures. It is read with merging off and with an engine in
turns, so that a busy machine slows both alike; what is in the cache is saved once a round, and
every preset starts from it. Presets whose scores are the attention of all queries add to the
reading itself: they are stated apart.

On a machine that does other things meanwhile, `--busy` counts the time of the processor instead of
the clock's, on one thread; the steps of a merge, which the engine times, are not told apart then.

    python benchmarks/merge_cost.py
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from kvmerge.budget import Budget
from kvmerge.policies import PRESETS, FlowMM, Policy
from session import Session, llama_cpp

PROMPT, BATCH, BUDGET, LAYERS = 4096, 512, 0.2, 16
STEPS = ("score", "match", "fold")


def policies() -> dict[str, Policy]:
    """Return every preset once, and FlowMM to the letter."""
    found: dict[str, Policy] = {}
    for name, policy in PRESETS.items():
        if policy is not None and policy not in found.values():
            found[name] = policy
    return found | {"flowmm-literal": FlowMM(bias="none")}


class Prompt:
    """A context that holds the prompt; ``read`` is the time that it took."""

    def __init__(
        self, model: Path, policy: Policy | None, n_tokens: int, threads: int, busy: bool = False
    ) -> None:
        self.clock = time.process_time if busy else time.perf_counter
        self.steps = () if busy else STEPS
        self.session = Session(model, merge=policy, n_ctx=n_tokens, n_batch=BATCH, threads=threads)
        engine = self.session.engine
        if engine:
            engine.keep_plans(False)
        rng = np.random.default_rng(5)
        tokens = rng.integers(0, self.session.n_vocab, n_tokens).tolist()
        picture = rng.standard_normal((BATCH, self.session.n_embd)).astype(np.float32)
        self.session.decode(tokens[:8])  # the first graph takes longer
        self.session.remove(-1, -1)
        self.session.position = 0
        start = self.clock()
        for i in range(0, n_tokens, 2 * BATCH):
            self.session.decode(tokens[i : i + BATCH])
            with engine.media("image") if engine else nullcontext():
                self.session.decode(embeddings=picture)
        self.read = self.clock() - start

    def __enter__(self) -> Prompt:
        return self

    def __exit__(self, *error: Any) -> None:
        self.session.__exit__(*error)

    def save(self) -> ctypes.Array[ctypes.c_uint8]:
        """Return what was read."""
        size = llama_cpp.llama_state_seq_get_size(self.session.context, 0)
        data = (ctypes.c_uint8 * size)()
        assert llama_cpp.llama_state_seq_get_data(self.session.context, data, size, 0) == size
        return data

    def merge(self, policy: Policy, data: ctypes.Array[ctypes.c_uint8]) -> dict[str, float]:
        """Merge what was read; return milliseconds by step."""
        engine = self.session.engine
        assert engine
        llama_cpp.llama_memory_clear(self.session.memory, True)
        read = llama_cpp.llama_state_seq_set_data(self.session.context, data, len(data), 0)
        assert read == len(data)
        engine.use(policy)
        n = engine.n_tokens() // 2
        cells = policy.kept_cells(Budget(BUDGET), n, n, n // BATCH)
        start = self.clock()
        engine.merge(cells)
        together = (self.clock() - start) * 1e3
        stats = engine.stats()
        steps = {step: getattr(stats, f"t_{step}_us") / 1e3 for step in self.steps}
        return steps | {"together": together}


def measure(
    model: Path, chosen: dict[str, Policy], n_tokens: int, rounds: int, threads: int, busy: bool
) -> tuple[float, dict[str, float], dict[str, dict[str, float]]]:
    """Return medians: reading with merging off, with each kind of score, and steps of presets."""
    off: list[float] = []
    reads: dict[str, list[float]] = defaultdict(list)
    steps: dict[str, list[dict[str, float]]] = defaultdict(list)
    scores = [("proxy", "position"), ("all",)]
    for _ in range(rounds):
        with Prompt(model, None, n_tokens, threads, busy) as prompt:
            off.append(prompt.read)
        for kinds in scores:
            group = {name: p for name, p in chosen.items() if p.score in kinds}
            if not group:
                continue
            first = next(iter(group.values()))
            with Prompt(model, first, n_tokens, threads, busy) as prompt:
                reads[kinds[0]].append(prompt.read)
                data = prompt.save()
                for name, policy in group.items():
                    steps[name].append(prompt.merge(policy, data))
    return (
        statistics.median(off),
        {kind: statistics.median(values) for kind, values in reads.items()},
        {
            name: {step: statistics.median(one[step] for one in runs) for step in runs[0]}
            for name, runs in steps.items()
        },
    )


def main() -> None:
    """Print a table of presets."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("presets", nargs="*", help="some of the presets; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=PROMPT, help=f"a multiple of {2 * BATCH}")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the random model")
    parser.add_argument("--threads", type=int, help="default: 2; with --busy 1")
    parser.add_argument("--busy", action="store_true", help="count the time of the processor")
    args = parser.parse_args()
    threads = args.threads or (1 if args.busy else 2)
    known = policies()
    for name in args.presets:
        if name not in known:
            parser.error(f"{name!r} is not one of {', '.join(known)}")
    chosen = {name: p for name, p in known.items() if not args.presets or name in args.presets}

    if args.tokens < 1 or args.tokens % (2 * BATCH):
        parser.error(f"--tokens must be a multiple of {2 * BATCH}")

    from needed_packages import need

    need("gguf")
    import gguf

    from random_model import Shape, write_random_model

    shape = Shape(layers=args.layers, heads=16, heads_kv=16, head_size=64, ffn=4096, vocab=4096)
    with tempfile.TemporaryDirectory() as folder:
        model = write_random_model(
            Path(folder) / "random-0.27b.gguf",
            shape,
            quantization=gguf.GGMLQuantizationType.Q8_0,
        )
        off, reads, steps = measure(model, chosen, args.tokens, args.rounds, threads, args.busy)

    print(f"MHA, {args.layers} layers x 16 heads of 64, Q8_0, threads: {threads},")
    print(f"{args.tokens} tokens of text and pictures kept to {BUDGET:.0%}, median of")
    print(f"{args.rounds} rounds\n")
    print(f"Reading with merging off: {off * 1e3:.0f} ms\n")
    for kind, read in reads.items():
        what = "all queries" if kind == "all" else "the last queries"
        print(f"Scored by {what}: reading {read * 1e3:.0f} ms ({read / off - 1:+.1%})\n")
        columns = list(next(iter(steps.values())))
        print("|", *(f"| {column} ms" for column in columns), "| share of reading |")
        print("| ---", *("| ---:" for _ in columns), "| ---: |")
        for name, row in steps.items():
            if (chosen[name].score == "all") == (kind == "all"):
                parts = " | ".join(f"{value:.0f}" for value in row.values())
                print(f"| `{name}` | {parts} | {row['together'] / off / 1e3:.1%} |")
        print()


if __name__ == "__main__":
    main()
