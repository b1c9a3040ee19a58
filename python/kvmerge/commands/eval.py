"""``kvmerge eval``: the quality table, every method over every task at several budgets."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .number import MOST_SEED, MOST_THREADS, MOST_TOKENS, Whole, fraction, listed
from .picture_options import add_picture_options, picture_options

if TYPE_CHECKING:
    from ..evaluation.samples import Sample

_PAGE, _PLOT = "quality.md", "quality.png"
_MOST_QUESTIONS, _MOST_DISTRACTORS, _MOST_JOBS, _LONGEST = 100_000, 100_000, 256, 2**24
_FEWEST_TOKENS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--model", type=Path, help="model (GGUF); default: the pocket model")
    parser.add_argument("--mmproj", type=Path, help="vision part of --model (GGUF)")
    parser.add_argument(
        "--data", type=Path, help="folder in MileBench's layout; default: the pocket tasks"
    )
    parser.add_argument(
        "--texts",
        type=Path,
        help="folder of .txt files: facts are hidden in their sentences and asked for, which needs "
        "no --mmproj",
    )
    parser.add_argument(
        "--tokens",
        type=listed(Whole(_FEWEST_TOKENS, _LONGEST)),
        default=(1024,),
        help="tokens of a prompt of --texts, such as 1024,4096; default: 1024",
    )
    parser.add_argument("--tasks", type=listed(str), help="which tasks, such as code,count")
    parser.add_argument(
        "--pictures",
        type=listed(_pictures),
        default=(12, 8),
        help="pictures in a prompt of the pocket tasks, such as 12,8 (the default)",
    )
    parser.add_argument(
        "--distractors",
        type=listed(Whole(0, _MOST_DISTRACTORS)),
        default=(40,),
        help="tokens of distracting text in a prompt of the pocket tasks, such as 40,200",
    )
    parser.add_argument(
        "--methods",
        type=listed(str),
        default=("all",),
        help="names, patterns such as mosaic*, reference, preset, quantized, ablation, or all "
        "(the default); --methods help lists them",
    )
    parser.add_argument(
        "--budgets",
        type=listed(fraction),
        default=(0.2, 0.1, 0.05),
        help="fractions that are kept, such as 0.2,0.1,0.05 (the default)",
    )
    add_picture_options(parser)
    parser.add_argument(
        "--mode",
        type=listed(str),
        default=("known",),
        help="known: merge when the question was read up to its last tokens; unknown: merge after "
        "another question and its answer; known,unknown: both",
    )
    parser.add_argument(
        "--merge-before",
        type=Whole(1, MOST_TOKENS),
        default=2,
        help="how many of the last tokens of a known question are read after the merge",
    )
    parser.add_argument(
        "--questions", type=Whole(1, _MOST_QUESTIONS), default=200, help="questions a task"
    )
    parser.add_argument(
        "--seed", type=Whole(0, MOST_SEED), default=0, help="other pictures and questions"
    )
    parser.add_argument(
        "--threads", type=Whole(1, MOST_THREADS), default=1, help="threads of each process"
    )
    parser.add_argument(
        "--jobs", type=Whole(1, _MOST_JOBS), default=1, help="processes side by side"
    )
    parser.add_argument(
        "--n-ctx",
        type=Whole(0, _LONGEST, "0 is as needed"),
        default=0,
        help="context length; default: as needed",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("kvmerge-eval"),
        help=f"folder of the answers, {_PAGE} and {_PLOT}; a run that was interrupted continues",
    )
    parser.add_argument(
        "--update",
        type=Path,
        action="append",
        default=[],
        help="also put the tables into this page, and the plot beside it",
    )
    parser.add_argument(
        "--report-only", action="store_true", help="make the table of the answers that are there"
    )


def _pictures(text: str) -> int:
    from ..pocket.tasks import MAX_PICTURES

    return Whole(1, MAX_PICTURES)(text)


def run(arguments: argparse.Namespace) -> int:
    """Run the evaluation and write the table."""
    if arguments.methods == ("help",):
        _print_methods()
        return 0
    _check(arguments)
    if not arguments.report_only:
        _answer(arguments)
    _report(arguments.out, arguments.update)
    return 0


def _print_methods() -> None:
    from ..evaluation.methods import METHODS

    for name, method in METHODS.items():
        print(f"{name:<24}{method.kind:<12}{method.what}")


def _check(arguments: argparse.Namespace) -> None:
    """Say before the work begins what would be missing at its end."""
    from importlib.util import find_spec

    from ..errors import OptionError, UnsupportedError
    from ..evaluation.tables import check_page

    needed = {"matplotlib": "the plot"}
    if arguments.data is not None and not arguments.report_only:
        needed["rouge"] = "ROUGE-L, a metric of MileBench,"
    for package, what in needed.items():
        if find_spec(package) is None:
            raise UnsupportedError(f"{what} needs the package {package}: install kvmerge[eval]")
    for page in arguments.update:
        check_page(page)
    if arguments.texts is not None:
        for option in ("--data", "--mmproj", "--image-merge", "--image-min-tokens"):
            if getattr(arguments, option[2:].replace("-", "_")) is not None:
                raise OptionError(f"--texts asks about text alone: leave {option} out")
        return
    if (arguments.model is None) == (arguments.mmproj is None):
        return
    if arguments.model is None:
        raise OptionError("--mmproj needs --model: it is the vision part of that model")
    raise OptionError(
        "--model needs --mmproj, its vision part (GGUF), as the questions are about pictures; a "
        "model for text alone is asked about the texts of a folder: --texts FOLDER"
    )


def _answer(arguments: argparse.Namespace) -> None:
    from .. import pocket
    from ..errors import OptionError
    from ..evaluation.answers import Record, Settings, definitions, identity
    from ..evaluation.methods import choose
    from ..evaluation.run import Models, Plan
    from ..evaluation.run import run as answer_all
    from ..evaluation.samples import MODES

    for mode in arguments.mode:
        if mode not in MODES:
            raise OptionError(f"there is no mode {mode!r}: it must be one of {', '.join(MODES)}")
    methods = choose(arguments.methods)
    model = arguments.model or pocket.model_path()
    mmproj = arguments.mmproj or (pocket.mmproj_path() if arguments.texts is None else None)
    model_identity = _identity(model, "model", identity)
    plan = Plan(
        samples=tuple(_samples(arguments, model)),
        methods=methods,
        budgets=arguments.budgets,
        modes=arguments.mode,
        merge_before=arguments.merge_before,
    )
    pictures = picture_options(arguments)
    models = Models(
        model, mmproj, arguments.n_ctx or _sized(arguments), arguments.threads, **pictures
    )
    folder = arguments.texts or arguments.data
    settings = Settings(
        model=model_identity,
        mmproj="none" if mmproj is None else _identity(mmproj, "mmproj", identity),
        data="pocket" if folder is None else folder.resolve().name,
        seed=arguments.seed,
        merge_before=arguments.merge_before,
        methods=definitions(methods),
        **pictures,
    )
    with Record(arguments.out, settings) as record:
        answer_all(
            plan,
            models,
            record,
            jobs=arguments.jobs,
            say=lambda line: print(line, flush=True),
        )


def _identity(file: Path, what: str, identity: Callable[[Path], str]) -> str:
    from ..errors import ModelError, ProjectorError
    from ..gguf_file import check_gguf

    return identity(check_gguf(file, what, ModelError if what == "model" else ProjectorError))


def _samples(arguments: argparse.Namespace, model: Path) -> Iterator[Sample]:
    from ..errors import OptionError
    from ..evaluation import milebench, pocket_tasks
    from ..pocket import TASKS

    if arguments.texts is not None:
        yield from _text_samples(arguments, model)
        return
    if arguments.data is None:
        tasks = arguments.tasks or TASKS
        pocket_tasks.check(tasks, arguments.pictures)
        for pictures in arguments.pictures:
            for distractor_tokens in arguments.distractors:
                yield from pocket_tasks.samples(
                    pictures,
                    arguments.questions,
                    seed=arguments.seed,
                    tasks=tasks,
                    distractor_tokens=distractor_tokens,
                )
        return
    if "unknown" in arguments.mode:
        raise OptionError("--mode unknown needs several questions about the same pictures")
    found = milebench.data_sets(arguments.data)
    for name in arguments.tasks or found:
        if name not in found:
            raise OptionError(f"{arguments.data} has no data set {name!r}: {', '.join(found)}")
        yield from milebench.samples(found[name], arguments.questions, seed=arguments.seed)


def _text_samples(arguments: argparse.Namespace, model: Path) -> Iterator[Sample]:
    from ..evaluation import needles
    from ..evaluation.samples import check_tasks
    from ..llama import Llama

    tasks = arguments.tasks or needles.TASKS
    check_tasks(tasks, needles.TASKS)
    texts = needles.read_texts(arguments.texts)
    with Llama(model, vocab_only=True, verbose=False) as tokenizer:
        for n_tokens in arguments.tokens:
            yield from needles.samples(
                texts,
                arguments.questions,
                seed=arguments.seed,
                n_tokens=n_tokens,
                count=lambda text: len(tokenizer.tokenize(text.encode(), add_bos=False)),
                tasks=tasks,
            )


def _sized(arguments: argparse.Namespace) -> int:
    """Return a context length that the prompts fit into."""
    if arguments.texts is not None:
        # With the facts and the question; no cell is made before it is needed.
        return max(arguments.tokens) + 512
    if arguments.data is not None:
        return 8192
    return 1024 + 96 * max(arguments.pictures) + 2 * max(arguments.distractors)


def _report(folder: Path, pages: Sequence[Path]) -> None:
    from ..errors import OptionError
    from ..evaluation.answers import read_answers, read_settings
    from ..evaluation.plot import draw
    from ..evaluation.tables import document, summary, table, update

    answers, settings = read_answers(folder), read_settings(folder)
    if not answers or settings is None:
        raise OptionError(f"{folder} holds no answers: run without --report-only first")
    (folder / _PAGE).write_text(document(answers, settings, _PLOT), encoding="utf-8")
    draw(answers, folder / _PLOT)
    print(summary(answers))
    for page in pages:
        update(page, {"table": table(answers, settings, _PLOT), "summary": summary(answers)})
        if page.resolve().parent != folder.resolve():
            (page.parent / _PLOT).write_bytes((folder / _PLOT).read_bytes())
    print(f"{len(answers)} answers; the table: {folder / _PAGE}, the plot: {folder / _PLOT}")
