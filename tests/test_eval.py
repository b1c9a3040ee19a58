"""``kvmerge eval``: few questions, but the real model, caches and files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from conftest import Factory, answer
from kvmerge import cli, pocket
from kvmerge.errors import OptionError
from kvmerge.evaluation import milebench, needles, pocket_tasks
from kvmerge.evaluation.answers import ANSWERS_FILE, SETTINGS_FILE, Answer, read_answers
from kvmerge.evaluation.bootstrap import difference
from kvmerge.evaluation.methods import METHODS, Method, choose
from kvmerge.evaluation.reader import Reader
from kvmerge.evaluation.scores import collect
from kvmerge.policies import PRESETS, FlowMM

TASKS = "code,letter_of"


def evaluate(out: Path, *options: str) -> int:
    small = ["--pictures", "3", "--questions", "2", "--tasks", TASKS, "--budgets", "0.3"]
    return cli.main(["eval", *small, "--out", str(out), *options])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the answers of some methods, in both modes."""
    folder = tmp_path_factory.mktemp("eval")
    methods = "q4_0,evict,mosaic,mosaic/evict,flowmm"
    assert evaluate(folder, "--methods", methods, "--mode", "known,unknown") == 0
    return folder


def test_every_answer_is_written_down(finished: Path) -> None:
    answers = read_answers(finished)
    rows = [("full", 1.0), ("q4_0", 1.0)]
    rows += [(name, 0.3) for name in ("flowmm", "mosaic", "evict", "mosaic/evict")]
    assert {(a.method, a.budget) for a in answers} == set(rows)
    assert len(answers) == len(rows) * 2 * 2 * 2  # modes, tasks, questions
    assert {a.collection for a in answers} == {"3 pictures"}
    by_row: dict[str, list[Answer]] = {}
    for one in answers:
        by_row.setdefault(one.method, []).append(one)
    for one in by_row["full"]:
        assert one.cells == one.tokens
    for one in by_row["flowmm"]:
        # 30 % of what was read before the merge, and the tokens after it
        assert 0.3 * (one.tokens - 12) <= one.cells <= 0.3 * one.tokens + 15
        assert one.kv_bytes < 0.4 * by_row["full"][0].kv_bytes
    assert by_row["q4_0"][0].kv_bytes == by_row["full"][0].kv_bytes * 18 // 64


def test_the_table(finished: Path) -> None:
    text = (finished / "quality.md").read_text(encoding="utf-8")
    for heading in ("3 pictures, question known", "3 pictures, question unknown", "30% kept"):
        assert heading in text
    for name in ("mosaic", "flowmm", "mosaic/evict", "evict"):
        assert f"`{name}`" in text
    for line in text.splitlines():
        if line.startswith("| `flowmm` "):
            assert line.count("[") == 2, "the intervals against full cache and best other"
    assert (finished / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_continues(finished: Path, tmp_path: Path) -> None:
    lines = (finished / ANSWERS_FILE).read_bytes().splitlines(keepends=True)
    settings = (finished / SETTINGS_FILE).read_bytes()
    (tmp_path / SETTINGS_FILE).write_bytes(settings)
    # cut in the middle of a line, as a crash leaves it
    (tmp_path / ANSWERS_FILE).write_bytes(b"".join(lines[:20]) + lines[20][:30])
    methods = "q4_0,evict,mosaic,mosaic/evict,flowmm"
    options = ["--methods", methods, "--mode", "known,unknown"]
    assert evaluate(tmp_path, *options, "--jobs", "2") == 0
    again = {one.key: one for one in read_answers(tmp_path)}
    assert again == {one.key: one for one in read_answers(finished)}


def test_nothing_is_answered_twice(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / ANSWERS_FILE).read_bytes()
    assert evaluate(finished, "--methods", "evict,flowmm") == 0
    assert "0 answers to give" in capsys.readouterr().out
    assert (finished / ANSWERS_FILE).read_bytes() == before


def test_answers_of_other_settings_are_refused(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, value in (("--seed", "3"), ("--merge-before", "4")):
        assert evaluate(finished, "--methods", "evict", option, value) == 1
        assert option[2:].replace("-", "_") in capsys.readouterr().err


def test_a_changed_method_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = json.loads((finished / SETTINGS_FILE).read_text())
    settings["methods"]["flowmm"]["policy"]["theta"] = 0.5
    (tmp_path / SETTINGS_FILE).write_text(json.dumps(settings))
    assert evaluate(tmp_path, "--methods", "flowmm") == 1
    assert "theta was 0.5" in capsys.readouterr().err


def test_report_only(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- quality:summary -->\nold\n<!-- /quality -->\nafter\n")
    arguments = ["eval", "--report-only", "--out", str(finished), "--update", str(page)]
    assert cli.main(arguments) == 0
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert "| `mosaic` |" in text
    page.write_text("no place\n")
    assert cli.main(arguments) == 1
    assert "quality:NAME" in capsys.readouterr().err
    assert cli.main(["eval", "--report-only", "--out", str(tmp_path / "none")]) == 1
    assert "holds no answers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "flowm"], "Did you mean 'flowmm'"),
        (["--methods", "nothing*"], "mosaic/no-bias"),
        (["--tasks", "cod"], "Did you mean 'code'"),
        (["--mode", "guess"], "known, unknown"),
        (["--model", "other.gguf"], "--model needs --mmproj"),
        (["--model", "other.gguf"], "--texts FOLDER"),
        (["--texts", ".", "--model", "missing.gguf"], "does not exist"),
        (["--texts", "."], "no task 'code': it must be one of one, keys"),
        (["--texts", ".", "--mmproj", "x.gguf"], "leave --mmproj out"),
        (["--texts", ".", "--data", "x"], "leave --data out"),
        (["--texts", ".", "--image-merge", "0.9"], "leave --image-merge out"),
        (["--texts", ".", "--image-min-tokens", "8"], "leave --image-min-tokens out"),
        (["--mmproj", "other.gguf"], "--mmproj needs --model"),
        (["--update", "missing.md"], "cannot be read"),
        (["--model", "other.gguf", "--mmproj", "x.gguf"], "does not exist"),
        (["--data", "missing"], "MileBench's layout"),
    ],
)
def test_bad_options(
    options: Sequence[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(tmp_path, *options) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / ANSWERS_FILE).exists()


# Reading once and answering many times gives what a chat gives.


@pytest.mark.parametrize("name", ["full", "flowmm", "mosaic", "h2o"])
def test_answers_are_those_of_a_chat(name: str, llama: Factory) -> None:
    method = METHODS[name]
    asks = next(pocket_tasks.samples(4, 1, seed=5)).load()[:3]
    options = {"kv_merge": method.policy, "kv_budget": 0.2, "merge_before": 2, "flash_attn": True}
    said, expected = [], []
    with Reader(
        pocket.model_path(), pocket.mmproj_path(), cache_type="f16", n_ctx=2048, threads=1
    ) as reader:
        first = reader.prompt(asks[0].messages)
        begin = len(first.segments[0].ids)  # up to the first picture
        reader.read(first, 0, begin)
        context = reader.snapshot()
        for ask in asks:
            prompt = reader.prompt(ask.messages)
            n = len(prompt.tokens)
            reader.restore(context)
            reader.read(prompt, begin, n - 2)
            for _ in range(2):  # the second from the state before the first one's merge
                question = reader.snapshot()
                merged = reader.merge(method, 0.2)
                assert merged == (name != "full")
                reader.read(prompt, n - 2, n)
                said.append(reader.generate(16))
                reader.restore(question)
    for ask in asks:
        llm = llama(**options)
        text = answer(llm, ask.messages, max_tokens=16).strip()
        expected += [text, text]
        llm.close()
    assert said == expected


def test_merging_before_the_question_leaves_it_whole() -> None:
    ask = next(pocket_tasks.samples(3, 1, seed=6)).load()[0]
    assert ask.messages_later is not None
    assert ask.messages_later[:-3] == ask.messages[:-1]
    assert ask.messages_later[-1] == ask.messages[-1]
    with Reader(
        pocket.model_path(), pocket.mmproj_path(), cache_type="f16", n_ctx=2048, threads=1
    ) as reader:
        prompt = reader.prompt(ask.messages_later)
        start = reader.question_start(ask.messages_later, prompt.tokens)
        llama = reader._llama
        question = llama.detokenize(prompt.tokens[start:], special=True).decode()
        assert question.strip().startswith(ask.messages[-1]["content"])


# Parts.


def test_pictures_are_read_as_fewer_tokens(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--methods", "flowmm", "--image-merge", "0.9", "--image-min-tokens", "6"]
    assert evaluate(tmp_path, *options) == 0
    whole = {one.key: one for one in read_answers(finished)}
    for one in read_answers(tmp_path):
        assert one.tokens < whole[one.key].tokens - 3 * 32
        assert one.cells <= one.tokens
    text = (tmp_path / "quality.md").read_text(encoding="utf-8")
    assert "with a cosine of at least 0.9 are one token" in text
    assert "cosine" not in (finished / "quality.md").read_text(encoding="utf-8")
    assert evaluate(tmp_path, "--methods", "flowmm", "--image-merge", "0.8") == 1
    assert "image_merge=0.9, and this run has image_merge=0.8" in capsys.readouterr().err
    assert evaluate(tmp_path, "--methods", "flowmm", "--image-merge", "0.9") == 1
    assert "image_min_tokens=6" in capsys.readouterr().err
    assert evaluate(tmp_path, *options) == 0, "the same go on"


def test_every_preset_is_a_row() -> None:
    policies = [method.policy for method in METHODS.values()]
    assert all(policy in policies for policy in PRESETS.values() if policy is not None)
    assert METHODS["flowmm-literal"].policy == FlowMM(bias="none", fold="mean", keys="move")
    assert {method.base for method in METHODS.values()} <= {None, *METHODS}


def test_choosing_methods() -> None:
    assert [method.name for method in choose(["flowmm/*", "q8_0"])][:3] == [
        "full",
        "q8_0",
        "flowmm/no-flow",
    ]
    assert len(choose(["all"])) == len(METHODS)
    with pytest.raises(OptionError, match="window=16"):
        Method(name="other", what="", policy=FlowMM(window=8))


def test_questions_follow_from_the_seed_alone() -> None:
    def asked(seed: int, tasks: Sequence[str]) -> list[tuple[str, str]]:
        sample = next(pocket_tasks.samples(5, 1, seed=seed, tasks=tasks))
        return [(ask.messages[-1]["content"], ask.expected) for ask in sample.load()]

    everything = asked(1, pocket.TASKS)
    assert asked(1, pocket.TASKS) == everything
    assert asked(1, ["count"]) == [everything[pocket.TASKS.index("count")]]
    assert asked(2, pocket.TASKS) != everything


def test_intervals_of_paired_differences() -> None:
    rng = np.random.default_rng(0)
    base = rng.random((200, 4)) < 0.7
    worse = base & (rng.random((200, 4)) < 0.9)
    interval = difference(worse.astype(float), base.astype(float))
    assert interval is not None
    assert interval.low < interval.value < interval.high < 0
    assert interval.value == pytest.approx(worse.mean() - base.mean())
    # the standard error of the mean, by the textbook
    spread = (worse.astype(float) - base).mean(axis=1).std() / np.sqrt(200)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * spread, rel=0.1)
    same = difference(base.astype(float), base.astype(float))
    assert same is not None and (same.low, same.high, same.is_clear) == (0, 0, False)
    holes = np.where(rng.random((200, 4)) < 0.5, np.nan, worse)
    assert difference(holes, base.astype(float)) is not None
    assert difference(np.full((3, 2), np.nan), np.zeros((3, 2))) is None


def test_scores_average_over_tasks(finished: Path) -> None:
    answers = read_answers(finished)
    known = collect(answers)[0]
    assert known.mode == "known" and known.tasks == ("letter_of", "code")
    points = [[a.score for a in answers if a.task == t and _is_full_known(a)] for t in known.tasks]
    assert known.average(("full", 1.0)) == pytest.approx(np.mean([np.mean(p) for p in points]))
    assert known.n_questions(("full", 1.0)) == 2
    assert known.budgets == (0.3,)


def _is_full_known(one: Answer) -> bool:
    return (one.method, one.mode) == ("full", "known")


# MileBench's layout.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets in MileBench's layout, of pocket pictures."""
    root = tmp_path_factory.mktemp("MileBench")
    rng = np.random.default_rng(11)
    for name, kind in (("Letters", "multi-choice"), ("Telling", "open-ended")):
        images = root / name / "images"
        images.mkdir(parents=True)
        data = []
        for i in range(2):
            prompt = pocket.make_prompt(rng, 2, tasks=["letter_of"], n_questions=1)
            for k, picture in enumerate(prompt.pictures):
                picture.image.save(images / f"{i}-{k}.png")
            right = prompt.questions[0].answer.split()[-1]
            instance = {
                "context": "Picture 1:{image#1}Picture 2:{image#2}" + prompt.questions[0].text,
                "images_path": [f"{i}-0.png", f"{i}-1.png"],
            }
            if kind == "multi-choice":
                instance["choice_list"] = sorted({p.letter for p in prompt.pictures})
            data.append(
                {
                    "sample_id": i,
                    "task_instruction_id": 0,
                    "task_instance": instance,
                    "response": right,
                }
            )
        meta = {"dataset": name, "question_type": kind, "task_instruction": ["Read."]}
        content = {"meta_data": meta, "data": data}
        (root / name / f"{name}.json").write_text(json.dumps(content))
    return root


def test_milebench(folder: Path, tmp_path: Path) -> None:
    options = ["--data", str(folder), "--methods", "mosaic", "--budgets", "0.3"]
    assert cli.main(["eval", *options, "--n-ctx", "2048", "--out", str(tmp_path)]) == 0
    answers = read_answers(tmp_path)
    assert {(a.task, a.method) for a in answers} == {
        (task, method) for task in ("Letters", "Telling") for method in ("full", "mosaic")
    }
    assert len(answers) == 8 and {a.pictures for a in answers} == {2}
    page = (tmp_path / "quality.md").read_text()
    assert "`Letters`" in page and "`Telling`" in page
    one = next(a for a in answers if a.method == "mosaic")
    assert one.cells < 0.4 * one.tokens


def test_milebench_puts_pictures_in_their_place(folder: Path) -> None:
    file = milebench.data_sets(folder)["Letters"]
    assert list(milebench.data_sets(file.parent)) == ["Letters"]
    (ask,) = next(milebench.samples(file, 1, seed=0)).load()
    kinds = [part["type"] for part in ask.messages[0]["content"]]
    assert kinds == ["text", "image_url", "text", "image_url", "text"]
    assert ask.messages[0]["content"][0]["text"] == "Read.\nPicture 1:"
    assert "\nChoice list: \nA. " in ask.messages[0]["content"][-1]["text"]
    assert ask.score(ask.expected) == 1.0


def test_a_folder_that_is_not_milebench(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "bad.json").write_text('{"data": []}')
    for data, message in ((tmp_path / "bad", "meta_data"), (tmp_path / "none", "layout")):
        assert cli.main(["eval", "--data", str(data), "--out", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err
    arguments = ["eval", "--data", str(folder), "--out", str(tmp_path / "out")]
    assert cli.main([*arguments, "--tasks", "Needles"]) == 1
    assert "Letters, Telling" in capsys.readouterr().err
    assert cli.main([*arguments, "--mode", "unknown"]) == 1
    assert "known" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "points"),
    [
        ("B. a red door", 1.0),
        ("a red door.", 1.0),
        ("The answer is: B", 0.0),  # "a" in it is a choice too
        ("B", 1.0),
        ("(b)", 1.0),
        ("A. a green key", 0.0),
        ("", 0.0),
    ],
)
def test_multiple_choice(said: str, points: float) -> None:
    choices = ["a green key", "A red door", "a box"]
    assert milebench.score("X", "multi-choice", "A red door", choices, said) == points


def test_other_metrics() -> None:
    score = milebench.score
    assert score("TextNeedleInAHaystack", "open-ended", "42", None, "It is 42.") == 1.0
    assert score("TextNeedleInAHaystack", "open-ended", "42", None, "421") == 0.0
    assert score("MMCoQA", "open-ended", "blue sky", None, "A blue sky, of course") == 1.0
    assert score("X", "open-ended", "the cat sat here", None, "The cat sat!") == pytest.approx(
        2 * 1 * 0.75 / 1.75
    )
    assert score("X", "open-ended", "a", None, "") == 0.0


# Texts, which need no vision part.


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of prose that the pocket model has words for."""
    folder = tmp_path / "texts" / "below"
    folder.mkdir(parents=True)
    for i, colour in enumerate(("red", "blue", "green")):
        (folder / f"{i}.txt").write_text(f"The code of the {colour} box is five. " * 12)
    return tmp_path / "texts"


def of_texts(folder: Path, out: Path, *options: str) -> int:
    small = ["--tokens", "96", "--questions", "2", "--budgets", "0.4", "--methods", "auto,evict"]
    return cli.main(["eval", "--texts", str(folder), *small, "--out", str(out), *options])


def test_texts_alone(texts: Path, tmp_path: Path) -> None:
    assert of_texts(texts, tmp_path, "--mode", "known,unknown") == 0
    answers = read_answers(tmp_path)
    assert {(a.method, a.budget) for a in answers} == {("full", 1), ("auto", 0.4), ("evict", 0.4)}
    assert len(answers) == 3 * 2 * 2 * len(needles.TASKS)
    assert {a.pictures for a in answers} == {0}
    for one in answers:
        assert one.tokens > 96
        if one.method == "full":
            assert one.cells == one.tokens
        else:  # also `auto`, which leaves text alone where there are pictures to shrink
            most = 0.4 * one.tokens + 3 if one.mode == "known" else one.tokens - 0.5 * 96
            assert one.cells <= most
    page = (tmp_path / "quality.md").read_text(encoding="utf-8")
    assert "96 tokens of text, question unknown" in page
    assert "`chain`" in page


def test_texts_that_do_not_suffice(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert of_texts(texts, tmp_path, "--tokens", "100000") == 1
    assert "a prompt is to have 100000" in capsys.readouterr().err
    assert of_texts(tmp_path / "none", tmp_path) == 1
    assert "no .txt file" in capsys.readouterr().err
    (texts / "latin.txt").write_bytes(b"caf\xe9")
    assert of_texts(texts, tmp_path) == 1
    assert "latin.txt cannot be read as a text in UTF-8" in capsys.readouterr().err
    assert not (tmp_path / ANSWERS_FILE).exists()


def test_needles_are_in_the_text_and_their_numbers_are_asked_for() -> None:
    rng = np.random.default_rng(4)
    sentences = needles.prose(["It is late. We go. They stay. All sleep."] * 9, rng, 60, len)
    assert 0 < sum(map(len, sentences)) <= 60
    facts = {"one": 1, "keys": 4, "values": 2, "chain": 3}
    for task in needles.TASKS:
        needle = needles.hide(rng, task, sentences)
        assert needle.text.count("special magic number") == facts[task]
        assert all(number in needle.text for number in needle.numbers)
        assert all(sentence in needle.text for sentence in sentences)
        assert not any(number in needle.question for number in needle.numbers)
        assert needles.share_told(" and ".join(needle.numbers), needle.numbers) == 1
    assert needles.share_told("12345", ("12345", "67890")) == 0.5


def test_what_is_asked_beside_does_not_change_a_question(texts: Path) -> None:
    def asked(*tasks: str) -> dict[str, object]:
        (sample,) = needles.samples(
            needles.read_texts(texts), 1, seed=1, n_tokens=40, count=len, tasks=tasks
        )
        return {ask.task: ask.messages for ask in sample.load()}

    assert asked("keys") == {"keys": asked(*needles.TASKS)["keys"]}


def test_a_missing_package_is_said_before_the_work_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    assert evaluate(tmp_path, "--methods", "evict") == 1
    assert "install kvmerge[eval]" in capsys.readouterr().err
    assert not (tmp_path / ANSWERS_FILE).exists()
