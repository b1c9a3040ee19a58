"""Merges that break off inside llama-server: no slot goes on from cells that are gone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from kvmerge import pocket
from serving import Answer, Server, is_built, serving

COMPILER = shutil.which("cc")

pytestmark = [
    pytest.mark.skipif(
        not (is_built() or os.environ.get("CI")), reason="built with KVMERGE_SERVER=OFF"
    ),
    pytest.mark.skipif(
        sys.platform != "linux" or COMPILER is None, reason="needs LD_PRELOAD and a C compiler"
    ),
]

GONE = "its cells are gone"


class Steps:
    """The steps of a server's engine, each of which can fail."""

    def __init__(self, server: Server, file: Path) -> None:
        self.server = server
        self._file = file

    def fail_at(self, n: int) -> int:
        """Let the n-th from now on fail, 0 none; return how many there were since last time."""
        self._file.write_text(f"{n}\n")
        os.kill(self.server.process.pid, signal.SIGUSR1)
        for _ in range(1000):
            said = self._file.read_text()
            if said.startswith("steps ") and said.endswith("\n"):
                return int(said.split()[1])
            time.sleep(0.01)
        raise AssertionError("the server does not take the signal")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What lets steps fail."""
    file = tmp_path_factory.mktemp("library") / "fail_at.so"
    source = Path(__file__).with_name("fail_at.c")
    assert COMPILER is not None
    line = [COMPILER, "-shared", "-fPIC", os.fspath(source), "-o", os.fspath(file), "-ldl"]
    subprocess.run(line, check=True)
    return file


@contextmanager
def failing(library: Path, folder: Path, *flags: str) -> Iterator[Steps]:
    """Start a server whose steps can fail; idle slots stay in its cache."""
    file = folder / "n"
    with serving(
        *("--kv-merge", "auto", "--cache-ram", "0", "--slot-save-path", f"{folder}{os.sep}"),
        *flags,
        LD_PRELOAD=os.fspath(library),
        KVMERGE_TEST_FAIL_AT=os.fspath(file),
    ) as server:
        yield Steps(server, file)


def album(seed: int) -> pocket.Prompt:
    return pocket.make_prompt(
        np.random.default_rng(seed), 5, tasks=["letter_of"], n_questions=2, distractor_tokens=0
    )


@pytest.fixture
def steps(library: Path, tmp_path: Path) -> Iterator[Steps]:
    # All is kept until the cap is reached.
    flags = ("--kv-budget", "1.0", "--kv-max-cells", "512", "--parallel", "2")
    with failing(library, tmp_path, *flags) as steps:
        yield steps


def test_no_slot_goes_on_from_cells_that_are_gone(steps: Steps) -> None:
    server = steps.server
    idle, busy = album(60), album(61)

    def fill() -> None:
        for slot in range(2):
            assert server.post(f"/slots/{slot}?action=erase", {}).status == 200
        assert server.chat(idle.messages(0), id_slot=0, max_tokens=4).status == 200
        server.held()

    fill()
    steps.fail_at(0)
    assert server.chat(busy.messages(0), id_slot=1, max_tokens=4).status == 200
    n_steps = steps.fail_at(0)
    assert server.get("/props")["kv_merge"]["merges"] > 0
    outcomes: set[str] = set()
    # Late ones come while a merge is put into the cache.
    for n in (1, n_steps // 3, *range(n_steps - 24, n_steps + 1, 6)):
        fill()
        before = len(server.log)
        steps.fail_at(n)
        answer = server.chat(busy.messages(0), id_slot=1, max_tokens=4)
        steps.fail_at(0)
        said = server.log[before:]
        held = server.held() and server.get("/slots")
        outcome = f"{answer.status}"
        assert answer.status in (200, 500), answer
        if f"slot 0: a merge broke off, and {GONE}" in said:
            outcome += " idle gone"
            assert held[0]["kv_merge"]["tokens"] == 0
        if held[0]["kv_merge"]["tokens"] == 0:
            # What it was shown is read again, and not taken to be there.
            again = server.chat(idle.messages(0), id_slot=0, max_tokens=4)
            assert again.status == 200
            assert again.cached == 0
        if f"slot 1: a merge broke off, and {GONE}" in said:
            outcome += " busy gone"
            assert answer.status == 500
            assert "merge" in answer["error"]["message"]
            assert held[1]["kv_merge"]["tokens"] == 0
        outcomes.add(outcome)
    assert any("idle gone" in outcome for outcome in outcomes), outcomes
    assert outcomes <= {"500", "500 idle gone", "500 busy gone", "200"}, outcomes


def test_a_prompts_merge_that_breaks_off(library: Path, tmp_path: Path) -> None:
    """It is an error of that request, or the prompt stays as it is; the next one is answered."""
    prompt = album(62)
    with failing(library, tmp_path, "--kv-budget", "0.2", "--parallel", "1") as steps:
        server = steps.server

        def chat() -> Answer:
            assert server.post("/slots/0?action=erase", {}).status == 200
            return server.chat(prompt.messages(0))

        expected = chat().text
        steps.fail_at(0)
        assert chat().text == expected
        n_steps = steps.fail_at(0)
        merges = server.get("/props")["kv_merge"]["merges"]
        assert merges == 2
        outcomes = set()
        for n in range(max(1, n_steps - 24), n_steps + 1, 4):
            steps.fail_at(n)
            answer = chat()
            steps.fail_at(0)
            outcomes.add(answer.status)
            if answer.status != 200:
                assert answer.status == 500
                assert "merging the KV cache failed" in answer["error"]["message"]
                assert server.held()["tokens"] == 0
            again = chat()
            assert (again.status, again.text) == (200, expected)
        assert 500 in outcomes
