"""Fewer tokens of a picture: time to the first word, and answers, side by side.

The pictures of a prompt are read as they come, and with as many tokens as ``--threshold`` leaves,
chosen in several ways: merged by likeness, as means of neighbouring places (what a smaller picture
would show), on a grid, and at random.  The last rows have the cache merged on top.  ``first`` is
the time to the first token with the pictures encoded, ``again`` without: they are found where they
are kept.

    python benchmarks/picture_path.py --threads 2

The pictures of the pocket model are uniform, so its answers show that a way works and not which is
best.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import kvmerge
from kvmerge import pocket
from kvmerge.media.image_merge import DEFAULT_THRESHOLD, ImageMerge, MergedTokens, merged_by

Embeddings = npt.NDArray[np.float32]


@dataclass(frozen=True)
class AtEqualTokens:
    """Leaves as many tokens as merging by likeness does, chosen in another way."""

    name: str
    choose: Callable[[Embeddings, int], MergedTokens]
    like: ImageMerge

    def __str__(self) -> str:
        return f"{self.name}/{self.like}"

    def __call__(self, embeddings: Embeddings) -> MergedTokens:
        return self.choose(embeddings, len(self.like(embeddings).kept))


def some(embeddings: Embeddings, kept: npt.NDArray[np.intp]) -> MergedTokens:
    """Return some of the tokens as they are; the others are left out."""
    ones = np.ones(len(kept), np.float32)
    return MergedTokens(embeddings[kept], kept, ones, np.full(len(embeddings), -1))


def on_a_grid(embeddings: Embeddings, m: int) -> MergedTokens:
    return some(embeddings, (np.arange(m) + 0.5).astype(np.intp) * len(embeddings) // m)


def at_random(embeddings: Embeddings, m: int) -> MergedTokens:
    rng = np.random.default_rng(0)
    return some(embeddings, np.sort(rng.choice(len(embeddings), m, replace=False)))


def of_neighbours(embeddings: Embeddings, m: int) -> MergedTokens:
    """Return means of rectangles of a square picture, as many as fit into m."""
    side = int(len(embeddings) ** 0.5)
    rows = int(m**0.5)
    columns = m // rows
    y, x = np.divmod(np.arange(side * side), side)
    block = y * rows // side * columns + x * columns // side
    first = np.array([np.flatnonzero(block == b)[0] for b in range(rows * columns)])
    return merged_by(embeddings, first[block])


def measured(
    llm: kvmerge.Llama, prompts: list[pocket.Prompt], repeats: int
) -> tuple[float, float, float, float]:
    """Return tokens of a prompt, seconds to its first token, those again, and the share right."""
    tokens, first, again, right = [], [], [], []
    for prompt in prompts:
        messages = prompt.messages(0)
        for times in (first, again):
            best = np.inf
            for _ in range(1 if times is first else repeats):
                llm.reset()
                start = time.perf_counter()
                llm.create_chat_completion(messages, max_tokens=1, temperature=0.0)
                best = min(best, time.perf_counter() - start)
            times.append(best)
        tokens.append(llm.n_tokens)
        for i, question in enumerate(prompt.questions):
            options: Any = {"temperature": 0.0, "repeat_penalty": 1.0, "max_tokens": 48}
            answer = llm.create_chat_completion(prompt.messages(i), **options)
            said = answer["choices"][0]["message"]["content"] or ""
            right.append(pocket.score(question.task, said, question.answer))
    return tuple(float(np.mean(values)) for values in (tokens, first, again, right))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threshold", type=float, default=DEFAULT_THRESHOLD, metavar="COSINE")
    parser.add_argument("--floor", type=int, default=4, help="tokens that a picture keeps at least")
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=10, help="with ten questions each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one prompt of two pictures")
    args = parser.parse_args()
    if args.quick:
        args.pictures, args.prompts, args.repeats = 2, 1, 1

    prompts = [
        pocket.make_prompt(np.random.default_rng(1000 + i), args.pictures)
        for i in range(args.prompts)
    ]
    merge = ImageMerge(args.threshold, args.floor)
    rules: list[tuple[str, Any]] = [
        ("as it comes", None),
        ("merged", merge),
        ("of neighbours", AtEqualTokens("of neighbours", of_neighbours, merge)),
        ("on a grid", AtEqualTokens("on a grid", on_a_grid, merge)),
        ("at random", AtEqualTokens("at random", at_random, merge)),
    ]
    print(f"{args.prompts} prompts of {args.pictures} pictures, threads: {args.threads}\n")
    print(f"{'pictures':<16}{'cache':<8}{'tokens':>8}{'first':>10}{'again':>10}{'right':>8}")
    for cache in (None, "auto"):
        for name, rule in rules[: None if cache is None else 2]:
            with kvmerge.Llama(
                pocket.model_path(),
                mmproj=pocket.mmproj_path(),
                kv_merge=cache,
                merge_before=2 if cache else 0,
                n_ctx=4096,
                n_threads=args.threads,
                n_threads_batch=args.threads,
                image_merge=None if rule is None else args.threshold,
                verbose=False,
            ) as llm:
                llm.chat_handler.image_merge = rule
                tokens, first, again, right = measured(llm, prompts, args.repeats)
            print(
                f"{name:<16}{cache or 'full':<8}{tokens:>8.0f}{first * 1e3:>7.0f} ms"
                f"{again * 1e3:>7.0f} ms{right:>8.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
