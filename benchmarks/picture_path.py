"""Fewer tokens of a picture: time to the first word, and answers, side by side.

The pictures of a prompt are read as they come, with as many tokens as each ``--threshold``
leaves, and with equal tokens chosen in several ways: merged by likeness, as means of neighbouring
places, on a grid, at random, and (with the album model) as the same pictures shown smaller.  The
last rows have the cache merged on top.  ``first`` is the time to the first token with the pictures
encoded, ``again`` without: they are found where they are kept.  ``right`` is the mean over the
kinds of questions, ``lost`` the paired difference to the pictures as they come with its 95 %
interval, both in per cent.

    python benchmarks/picture_path.py --threads 2
    python benchmarks/picture_path.py --photographs FOLDER --threads 2

Without ``--photographs`` it asks the pocket model, whose pictures are uniform: its answers show
that a way works and not which is best.  With a folder of photographs it asks the album model of
``album.py``.  The row of tokens at random says whether a model can tell methods apart: it has to
cost many points.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import kvmerge
from kvmerge import pocket
from kvmerge.evaluation.bootstrap import difference
from kvmerge.media.image_merge import (
    DEFAULT_THRESHOLD,
    ImageMerge,
    MergedTokens,
    groups_of,
    merged_by,
)

Embeddings = npt.NDArray[np.float32]


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


def by_likeness(embeddings: Embeddings, m: int) -> MergedTokens:
    """Merge as `image_merge` does, with the highest threshold that leaves m tokens or fewer."""
    low, high = -1.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        if len(np.unique(groups_of(embeddings, middle, 1))) > m:
            high = middle
        else:
            low = middle
    return merged_by(embeddings, groups_of(embeddings, low, m))


CHOICES = {
    "by likeness": by_likeness,
    "of neighbours": of_neighbours,
    "on a grid": on_a_grid,
    "at random": at_random,
}


@dataclass(frozen=True)
class OfEachPicture:
    """Leaves a number of tokens of each picture."""

    tokens: int
    name: str

    def __str__(self) -> str:
        return f"{self.name}/{self.tokens}"

    def __call__(self, embeddings: Embeddings) -> MergedTokens:
        return CHOICES[self.name](embeddings, self.tokens)


@dataclass(frozen=True)
class Asked:
    """One question: its kind, the chat, and what gives the points of an answer."""

    task: str
    messages: list[dict[str, Any]]
    score: Callable[[str], float]


@dataclass(frozen=True)
class Source:
    """A model, and prompts with questions about their pictures."""

    model: Path
    mmproj: Path
    prompts: list[list[Asked]]
    smaller: dict[int, Source] = field(default_factory=dict)
    """The same with pictures shown smaller, by the tokens of a picture."""


def of_the_pocket_model(n_prompts: int, n_pictures: int) -> Source:
    prompts = []
    for i in range(n_prompts):
        prompt = pocket.make_prompt(np.random.default_rng(1000 + i), n_pictures)
        prompts.append(
            [
                Asked(question.task, prompt.messages(k), partial(_pocket_score, question))
                for k, question in enumerate(prompt.questions)
            ]
        )
    return Source(pocket.model_path(), pocket.mmproj_path(), prompts)


def _pocket_score(question: pocket.Question, said: str) -> float:
    return pocket.score(question.task, said, question.answer)


def of_albums(folder: Path, n_prompts: int, n_pictures: int, sizes: list[int]) -> Source:
    from real_parts import album, build, parts

    language_model = parts.fetch(parts.SMOLLM2)
    samples = album.samples(
        n_prompts,
        n_pictures,
        album.photographs(folder, language_model),
        album.vocabulary(language_model),
        seed=1,
    )
    prompts = [
        [Asked(ask.task, ask.messages, ask.score) for ask in sample.load()] for sample in samples
    ]
    smaller = {}
    for side, n in ((28 * int(n**0.5), n) for n in sizes if int(n**0.5) ** 2 == n):
        smaller[n] = Source(*build.build(side=side), [shrunk(each, side) for each in prompts])
    return Source(*build.build(), prompts, smaller)


def shrunk(questions: list[Asked], side: int) -> list[Asked]:
    """Return the questions about pictures of so many pixels a side."""

    def part(each: dict[str, Any]) -> dict[str, Any]:
        if each["type"] != "image_url":
            return each
        return {**each, "image_url": {"url": each["image_url"]["url"].resize((side, side))}}

    return [
        replace(
            question,
            messages=[
                {**message, "content": [part(each) for each in message["content"]]}
                for message in question.messages
            ],
        )
        for question in questions
    ]


@dataclass(frozen=True)
class Measured:
    """Means over the prompts: tokens, seconds to the first one, and those again.

    Points are those of each question, [prompts, tasks]; NaN where a prompt has none of a task.
    """

    tokens: float
    first: float
    again: float
    points: npt.NDArray[np.float64]

    def row(self, whole: Measured) -> str:
        """Return its line of the table."""
        right = np.nanmean(np.nanmean(self.points, axis=0))
        lost = difference(self.points, whole.points)
        assert lost is not None
        low, high = (f"{100 * end:+.1f}" for end in (lost.low, lost.high))
        return (
            f"{self.tokens:>8.0f}{self.first * 1e3:>8.0f} ms{self.again * 1e3:>8.0f} ms"
            f"{100 * right:>8.1f}{100 * lost.value:>8.1f} [{low}, {high}]"
        )


def measured(llm: kvmerge.Llama, prompts: list[list[Asked]], repeats: int) -> Measured:
    """Read every prompt, and ask all of its questions."""
    tasks = sorted({question.task for questions in prompts for question in questions})
    points = np.full((len(prompts), len(tasks)), np.nan)
    tokens, first, again = [], [], []
    for row, questions in zip(points, prompts, strict=True):
        messages = questions[0].messages
        for times in (first, again):
            best = np.inf
            for _ in range(1 if times is first else repeats):
                llm.reset()
                start = time.perf_counter()
                llm.create_chat_completion(messages, max_tokens=1, temperature=0.0)
                best = min(best, time.perf_counter() - start)
            times.append(best)
        tokens.append(llm.n_tokens)
        for question in questions:
            options: Any = {"temperature": 0.0, "repeat_penalty": 1.0, "max_tokens": 48}
            answer = llm.create_chat_completion(question.messages, **options)
            said = answer["choices"][0]["message"]["content"] or ""
            row[tasks.index(question.task)] = question.score(said)
    means = (float(np.mean(values)) for values in (tokens, first, again))
    return Measured(*means, points)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photographs", type=Path, metavar="FOLDER", help="ask the album model")
    parser.add_argument(
        "--threshold", type=float, nargs="+", default=[DEFAULT_THRESHOLD], metavar="COSINE"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="*",
        default=[16],
        metavar="N",
        help="of a picture, to compare at",
    )
    parser.add_argument("--floor", type=int, default=4, help="tokens that a picture keeps at least")
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=10, help="with ten questions each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one prompt of two pictures")
    args = parser.parse_args()
    if args.quick:
        args.pictures, args.prompts, args.repeats = 2, 1, 1

    if args.photographs is None:
        source = of_the_pocket_model(args.prompts, args.pictures)
    else:
        source = of_albums(args.photographs, args.prompts, args.pictures, args.tokens)
    rows: list[tuple[str, str | None, Any, Source]] = [("as it comes", None, None, source)]
    for threshold in args.threshold:
        rule = ImageMerge(threshold, args.floor)
        rows.append((f"merged, {threshold:g}", None, rule, source))
    on_top = [*rows]
    for tokens in args.tokens:
        for name in CHOICES:
            rows.append((f"{name}, {tokens}", None, OfEachPicture(tokens, name), source))
        if tokens in source.smaller:
            rows.append((f"smaller, {tokens}", None, None, source.smaller[tokens]))
    rows += [(name, "auto", rule, source) for name, _, rule, _ in on_top]
    asked = f"{args.prompts} prompts of {args.pictures} pictures"
    print(f"{source.model.stem}, {asked}, threads: {args.threads}\n")
    print(
        f"{'pictures':<20}{'cache':<8}{'tokens':>8}{'first':>11}{'again':>11}{'right':>8}{'lost':>8}"
    )
    whole = None
    for name, cache, rule, shown in rows:
        with kvmerge.Llama(
            shown.model,
            mmproj=shown.mmproj,
            kv_merge=cache,
            merge_before=2 if cache else 0,
            n_ctx=4096,
            n_threads=args.threads,
            n_threads_batch=args.threads,
            image_merge=None if rule is None else DEFAULT_THRESHOLD,
            verbose=False,
        ) as llm:
            llm.chat_handler.image_merge = rule
            found = measured(llm, shown.prompts, args.repeats)
        whole = whole or found
        print(f"{name:<20}{cache or 'full':<8}{found.row(whole)}", flush=True)


if __name__ == "__main__":
    main()
