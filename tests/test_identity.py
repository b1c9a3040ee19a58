"""Switched off, every logit is that of the stock library, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from random_model import Shape, write_random_model
from stock_library import stock_libraries

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def stock() -> Path:
    return stock_libraries()


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("models") / "random.gguf", Shape(), seed=11)


def run(arguments: list[str], stock: Path | None) -> list[str]:
    """Run print_logits.py in a process of its own; return which library, digest, variety."""
    environment = {k: v for k, v in os.environ.items() if k != "STOCK_LIBRARIES"}
    if stock:
        environment["STOCK_LIBRARIES"] = str(stock)
    done = subprocess.run(
        [sys.executable, HERE / "print_logits.py", *arguments],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()[-3:]


@pytest.mark.parametrize(
    ("cache_type", "flash_attention"),
    [("f16", True), ("f16", False), ("f32", False), ("q8_0", True)],
)
def test_off_is_stock(
    stock: Path, random_model: Path, cache_type: str, flash_attention: bool
) -> None:
    arguments = [str(random_model), cache_type, str(flash_attention)]
    which, expected, variety = run(arguments, stock)
    assert which == "stock"
    assert int(variety) > 3, "the model says always the same: the test would see nothing"
    assert run(arguments, None)[:2] == ["ours", expected]
    # an engine that observes but has merged nothing changes nothing either
    assert run([*arguments, "attach"], None)[:2] == ["ours", expected]


def test_pocket_model_off_is_stock(stock: Path) -> None:
    from kvmerge.pocket import model_path

    arguments = [str(model_path()), "f16", "True"]
    _, expected, _ = run(arguments, stock)
    assert run(arguments, None)[:2] == ["ours", expected]
