"""A signal ends llama-server, whatever it does at that moment."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kvmerge import pocket
from serving import Server, is_built, serving

COMPILER = shutil.which("cc")

pytestmark = [
    pytest.mark.skipif(
        not (is_built() or os.environ.get("CI")), reason="built with KVMERGE_SERVER=OFF"
    ),
    pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals"),
]

TIME = 60
"""Seconds that a server may take to end: far longer than the work that it has begun."""


def ended(server: Server) -> int:
    """Return the exit status of a server that was sent one signal."""
    try:
        return server.process.wait(TIME)
    except subprocess.TimeoutExpired:
        server.process.kill()
        raise AssertionError(f"it did not end: {server.log[-2000:]}") from None


@pytest.mark.skipif(
    sys.platform != "linux" or COMPILER is None, reason="needs LD_PRELOAD and a C compiler"
)
def test_a_signal_that_comes_while_a_lock_is_held(tmp_path: Path) -> None:
    library, now = tmp_path / "signal_in_lock.so", tmp_path / "now"
    source = Path(__file__).with_name("signal_in_lock.c")
    assert COMPILER is not None
    line = [COMPILER, "-shared", "-fPIC", os.fspath(source), "-o", os.fspath(library), "-ldl"]
    subprocess.run(line, check=True)
    variables = {"LD_PRELOAD": os.fspath(library), "KVMERGE_TEST_SIGNAL": os.fspath(now)}
    with serving("--parallel", "1", ends=True, **variables) as server:
        time.sleep(0.5)  # until it waits for tasks
        now.touch()
        assert ended(server) == 0
        assert "cleaning up" in server.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_while_it_reads_and_answers(number: signal.Signals) -> None:
    prompt = pocket.make_prompt(np.random.default_rng(1), 6, n_questions=1)
    long = {"max_tokens": 3000, "ignore_eos": True}
    with serving("--kv-merge", "auto", "--parallel", "2", ends=True) as server:
        with ThreadPoolExecutor(3) as pool:
            answers = [pool.submit(server.chat, prompt.messages(0), **long) for _ in range(3)]
            time.sleep(0.5)  # two are read or answered, and one waits for a slot
            server.process.send_signal(number)
            status = ended(server)
        assert status == 0
        for answer in answers:
            assert answer.result().status == 503
            assert "stopping" in answer.result()["error"]["message"]
