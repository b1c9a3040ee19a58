"""llama-mtmd-cli and llama-cli with a cache that merges, where they were built.

They are not shipped: ``cmake -S . -B build/tools -DKVMERGE_BUILD_TOOLS=ON && cmake --build
build/tools --target llama-cli llama-mtmd-cli``, and ``KVMERGE_PROGRAMS=build/tools/bin``.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from kvmerge import pocket

FOLDER = os.environ.get("KVMERGE_PROGRAMS")
PICTURES = 6

pytestmark = pytest.mark.skipif(
    FOLDER is None, reason="KVMERGE_PROGRAMS names no folder of llama-cli and llama-mtmd-cli"
)


@pytest.fixture(params=["llama-mtmd-cli", "llama-cli"])
def line(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """What starts the program with pictures and a question."""
    prompt = pocket.make_prompt(np.random.default_rng(1), PICTURES, n_questions=1)
    line = [os.fspath(Path(FOLDER or "", request.param)), "-m", os.fspath(pocket.model_path())]
    line += ["--mmproj", os.fspath(pocket.mmproj_path()), "--ctx-size", "4096", "--threads", "1"]
    line += ["--temp", "0", "-n", "16", "--verbosity", "3", "-p", prompt.questions[0].text]
    for i, picture in enumerate(prompt.pictures):
        file = tmp_path / f"{i}.png"
        picture.image.save(file)
        line += ["--image", os.fspath(file)]
    if request.param == "llama-cli":
        line += ["--single-turn"]
    return line


def said(line: list[str], *flags: str) -> tuple[int, str]:
    run = subprocess.run(
        [*line, *flags], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300
    )
    return run.returncode, run.stdout + run.stderr


def test_it_merges(line: list[str]) -> None:
    status, text = said(line, "--kv-merge", "auto", "--kv-budget", "0.2")
    assert status == 0, text[-2000:]
    merged = re.search(r"merged (\d+) cells into (\d+) \((\d+) tokens", text)
    assert merged, text[-2000:]
    before, after, tokens = map(int, merged.groups())
    assert before == tokens > PICTURES * 64
    assert after <= before - 0.7 * PICTURES * 64


def test_without_the_flag_it_does_not(line: list[str]) -> None:
    status, text = said(line)
    assert status == 0, text[-2000:]
    assert "merged" not in text


def test_what_does_not_go_is_refused(line: list[str]) -> None:
    status, text = said(line, "--kv-merge", "atuo")
    assert status != 0
    assert "it is none, or one of auto" in text
