"""The run: every sample read once, every question answered by every method at every budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from ..errors import ContextLengthError, OptionError
from .answers import Answer, Record
from .methods import Method
from .reader import Reader, common_prefix
from .samples import Ask, Asked, Sample

_SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be answered.

    Attributes
    ----------
    samples : tuple of Sample
        What is asked.
    methods : tuple of Method
        With which caches.
    budgets : tuple of float
        At which fractions kept.
    modes : tuple of str
        When merged: of `samples.MODES`.
    merge_before : int
        How many of the last tokens are read after the merge when the question is known.
    of_pictures : bool
        Whether a budget is a fraction of the pictures' tokens for every method, beside as many
        cells as there is text.
    """

    samples: tuple[Sample, ...]
    methods: tuple[Method, ...]
    budgets: tuple[float, ...]
    modes: tuple[str, ...]
    merge_before: int
    of_pictures: bool = False

    @property
    def cache_types(self) -> tuple[str, ...]:
        """The types of cache that the methods use."""
        return tuple(dict.fromkeys(method.cache_type for method in self.methods))

    def rows(self, cache_type: str) -> list[tuple[Method, float]]:
        """Return methods with their budgets, of one type of cache."""
        return [
            (method, budget)
            for method in self.methods
            if method.cache_type == cache_type
            for budget in method.kept(self.budgets)
        ]


@dataclass(frozen=True)
class Models:
    """With what it is answered.

    Attributes
    ----------
    model, mmproj : Path
        The files; no mmproj: about texts alone.
    n_ctx : int
        Context length.
    threads : int
        Threads of each process.
    image_merge, image_min_tokens : optional
        How many tokens of a picture are read, as in `Llama`.
    """

    model: Path
    mmproj: Path | None
    n_ctx: int
    threads: int
    image_merge: float | None = None
    image_min_tokens: int | None = None

    def reader(self, cache_type: str) -> Reader:
        """Load the model with a cache of a type."""
        return Reader(
            self.model,
            self.mmproj,
            cache_type=cache_type,
            n_ctx=self.n_ctx,
            threads=self.threads,
            image_merge=self.image_merge,
            image_min_tokens=self.image_min_tokens,
        )


@dataclass(frozen=True)
class Work:
    """One sample in one mode, with what is missing of each task's answers."""

    sample: Sample
    mode: str
    merge_before: int
    of_pictures: bool
    rows: dict[str, list[tuple[Method, float]]]

    @property
    def n_answers(self) -> int:
        """How many answers it gives."""
        return sum(map(len, self.rows.values()))


def run(
    plan: Plan,
    models: Models,
    record: Record,
    *,
    jobs: int = 1,
    say: Callable[[str], None] = print,
) -> None:
    """Answer what is not answered yet.

    Parameters
    ----------
    plan : Plan
        What is to be answered.
    models : Models
        With what.
    record : Record
        Where answers are written, and what is there already.
    jobs : int
        How many processes work side by side.
    say : callable
        Is told how far the run is.
    """
    todo = {cache_type: _missing(plan, record, cache_type) for cache_type in plan.cache_types}
    total = sum(work.n_answers for works in todo.values() for work in works)
    there = len(record.answers)
    say(f"{total} answers to give" + (f", {there} are there already" if there else ""))
    done, start = 0, time.monotonic()
    last = start
    for cache_type, works in todo.items():
        if not works:
            continue
        for answers in _answer_all(models, cache_type, works, min(jobs, len(works))):
            record.add(answers)
            done += len(answers)
            now = time.monotonic()
            if now - last >= _SECONDS_BETWEEN_LINES:
                last, left = now, (now - start) / done * (total - done)
                at = f"{answers[-1].collection}, sample {answers[-1].sample}, {cache_type}"
                say(f"{done} of {total} answers ({at}), {left / 60:.1f} minutes left")
    if total:
        seconds = time.monotonic() - start
        say(f"{total} answers in {seconds:.0f} s, {1000 * seconds / total:.0f} ms each")


def _missing(plan: Plan, record: Record, cache_type: str) -> list[Work]:
    """Return what is not answered yet, sample by sample."""
    works = []
    for sample in plan.samples:
        for mode in plan.modes:
            missing = {}
            for task in sample.tasks:
                where = (mode, sample.collection, sample.name, task)
                missing[task] = [
                    (method, budget)
                    for method, budget in plan.rows(cache_type)
                    if (method.name, budget, *where) not in record.done
                ]
            works.append(Work(sample, mode, plan.merge_before, plan.of_pictures, missing))
    return [work for work in works if work.n_answers]


def _answer_all(
    models: Models, cache_type: str, works: Sequence[Work], jobs: int
) -> Iterator[list[Answer]]:
    if jobs == 1:
        with models.reader(cache_type) as reader:
            for work in works:
                yield from answer(reader, work)
        return
    pool = ProcessPoolExecutor(
        jobs,
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(models, cache_type),
    )
    try:
        for future in as_completed([pool.submit(_work, work) for work in works]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


_reader: Reader | None = None
"""The model of a worker process."""


def _start_worker(models: Models, cache_type: str) -> None:
    global _reader
    _reader = models.reader(cache_type)


def _work(work: Work) -> list[Answer]:
    assert _reader is not None
    return [one for answers in answer(_reader, work) for one in answers]


def answer(reader: Reader, work: Work) -> Iterator[list[Answer]]:
    """Read what all questions of a sample begin with, once, and answer them one by one.

    Parameters
    ----------
    reader : Reader
        The model.
    work : Work
        What is missing.

    Yields
    ------
    list of Answer
        The answers to one question.
    """
    sample, mode = work.sample, work.mode
    asks = [ask for ask in sample.load() if work.rows[ask.task]]
    try:
        prompts = [reader.prompt(_messages(ask, mode)) for ask in asks]
        tokens = [prompt.tokens for prompt in prompts]
        ends = [_merge_point(reader, work, ask, ids) for ask, ids in zip(asks, tokens, strict=True)]
        shared = min(common_prefix(tokens), *ends)
        reader.reset()
        reader.read(prompts[0], 0, shared)
        context = reader.snapshot()
        for ask, prompt, end in zip(asks, prompts, ends, strict=True):
            reader.restore(context)
            reader.read(prompt, shared, end)
            question = reader.snapshot()
            answers = []
            for method, budget in work.rows[ask.task]:
                reader.restore(question)
                reader.merge(method, budget, of_pictures=work.of_pictures)
                reader.read(prompt, end, len(prompt.tokens))
                cells, held = reader.held()
                said = reader.generate(ask.max_tokens)
                answers.append(
                    Answer(
                        method=method.name,
                        budget=budget,
                        mode=mode,
                        collection=sample.collection,
                        sample=sample.name,
                        task=ask.task,
                        pictures=sample.pictures,
                        expected=ask.expected,
                        answer=said,
                        score=ask.score(said),
                        tokens=len(prompt.tokens),
                        cells=round(cells, 2),
                        kv_bytes=held,
                    )
                )
            yield answers
    except ContextLengthError as error:
        raise ContextLengthError(f"{sample.collection}, sample {sample.name}: {error}") from error
    finally:
        reader.forget_prompts()


def _messages(ask: Ask, mode: str) -> Asked:
    if mode == "known":
        return ask.messages
    if ask.messages_later is None:
        raise OptionError("these questions have no other before them: the mode must be known")
    return ask.messages_later


def _merge_point(reader: Reader, work: Work, ask: Ask, tokens: Sequence[int]) -> int:
    """Return after how many tokens the cache is merged: always before the last one."""
    if work.mode == "unknown":
        return reader.question_start(_messages(ask, work.mode), tokens)
    last_media = max((i + 1 for i, token in enumerate(tokens) if token < 0), default=0)
    return max(len(tokens) - work.merge_before, last_media)
