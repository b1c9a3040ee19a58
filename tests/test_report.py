"""The report: complete, self-contained, and true to the engine."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Factory, answer
from kvmerge import pocket
from kvmerge.errors import OptionError, StateError
from kvmerge.report import merge_view, patch_grid, write_report


class Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize(
    ("n", "grid"), [(64, (8, 8)), (256, (16, 16)), (96, (12, 8)), (7, (7, 1)), (1, (1, 1))]
)
def test_patch_grid(n: int, grid: tuple[int, int]) -> None:
    assert patch_grid(n) == grid


def write(path: Path, view: dict[str, Any] | None, prompt: pocket.Prompt) -> str:
    write_report(
        path,
        title="a </title><b>",
        header=["", "tokens seen"],
        rows=[["full", "1"], ["merged", "1"]],
        meanings=[("tokens seen", "all")],
        turns=[
            {
                "question": "</script>?",
                "expected": "x",
                "answers": [{"text": "x", "score": 1.0, "mark": "✓"}] * 2,
            }
        ],
        pictures=[(picture.image, picture.letter) for picture in prompt.pictures],
        view=view,
    )
    return path.read_text()


@pytest.mark.parametrize("merge", [None, "auto"])
def test_report_of_a_chat(
    merge: str | None, tmp_path: Path, llama: Factory, prompt: pocket.Prompt
) -> None:
    llm, messages = llama(kv_merge=merge), prompt.messages(0)
    said = answer(llm, messages)
    file = llm.report(tmp_path / "chat.html", [*messages, {"role": "assistant", "content": said}])
    page = file.read_text(encoding="utf-8")
    data = json.loads(re.search(r'type="application/json" id="data">(.*?)</script>', page, re.S)[1])
    assert data["turns"][-1]["answers"] == [{"text": said}]
    assert prompt.questions[0].text in data["turns"][-1]["question"]
    assert len(data["pictures"]) == 4
    assert data["rows"][0][1:3] == [str(llm.kv_stats().tokens), str(llm.kv_stats().cells)]
    assert (data["view"] is None) == (merge is None)
    assert "{{" not in page
    Elements(page)


def test_report_without_a_trace(tmp_path: Path, llama: Factory, prompt: pocket.Prompt) -> None:
    llm = llama(kv_merge="auto", kv_trace=False)
    answer(llm, prompt.messages(0))
    with pytest.raises(StateError, match="kv_trace=True"):
        llm.report(tmp_path / "chat.html", prompt.messages(0))
    with pytest.raises(OptionError, match="cannot be written"):
        llm.report(tmp_path, prompt.messages(0))


def test_report_of_a_merge(tmp_path: Path, llama: Factory, prompt: pocket.Prompt) -> None:
    llm = llama(kv_merge="flowmm", kv_budget=0.2)
    answer(llm, prompt.messages(0))
    view = merge_view(llm)
    assert view is not None
    page = write(tmp_path / "report.html", view, prompt)

    elements = Elements(page).found
    assert not [a for _, a in elements if {"src", "href"} & a.keys()], "nothing is fetched"
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", page)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert len(data["pictures"]) == 4
    assert all(picture["src"].startswith("data:image/png") for picture in data["pictures"])
    layers = data["view"]["layers"]
    assert len(layers) == len(llm.kv_stats().flow)
    assert data["view"]["grids"] == [[8, 8]] * 4
    for layer in layers:
        for head in layer["heads"]:
            assert [len(string) for string in head] == [64] * 4
            assert set("".join(head)) <= set("123"), "folding drops nothing"


def test_fates_are_those_of_the_engine(llama: Factory, prompt: pocket.Prompt) -> None:
    llm = llama(kv_merge="evict", kv_budget=0.2)
    answer(llm, prompt.messages(0))
    view = merge_view(llm)
    assert view is not None and llm.engine is not None
    plan = llm.engine.plan(1, 0)
    span = llm.media_spans[2]
    fates = dict(zip(plan.order.tolist(), plan.fate.tolist(), strict=True))
    expected = "".join(str(fates[order]) for order in range(span.start, span.end))
    assert view["layers"][1]["heads"][0][2] == expected
    kept = np.mean([plan.fate[plan.modality == 1] >= 2])
    first = view["layers"][1]["kept"]["image"]
    assert 0 <= first <= 1 and 0 <= kept <= 1


def test_report_without_a_merge(tmp_path: Path, prompt: pocket.Prompt) -> None:
    page = write(tmp_path / "report.html", None, prompt)
    assert '"view":null' in page


def test_no_view_when_merging_is_off(llama: Factory, prompt: pocket.Prompt) -> None:
    llm = llama()
    answer(llm, prompt.messages(0))
    assert merge_view(llm) is None


def test_report_cannot_be_written(tmp_path: Path, prompt: pocket.Prompt) -> None:
    with pytest.raises(OptionError, match="cannot be written"):
        write(tmp_path / "nowhere" / "report.html", None, prompt)
