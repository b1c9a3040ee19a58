"""Saved states with random damage: refused or sound, and never more than that.

``python tools/fuzz_states.py`` does the same many times over, with sanitizers.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))

from fuzz_states import TARGETS, Files  # noqa: E402


@pytest.mark.parametrize("kind", TARGETS)
def test_damage_is_refused_or_does_no_harm(kind: str, tmp_path: Path) -> None:
    target = TARGETS[kind](tmp_path)
    try:
        found: Counter[str] = Counter()
        for seed in range(30):
            data = target.damage(random.Random(f"{kind} {seed}"))
            found[target.load(data, seed % 10 == 0)] += 1
    finally:
        target.close()
    assert found["refused"] > 5


@pytest.mark.parametrize("kind", ["file, mosaic, cap", "file, off"])
def test_nan_is_gone_with_the_state_that_had_it(kind: str, tmp_path: Path) -> None:
    target = TARGETS[kind](tmp_path)
    assert isinstance(target, Files)
    try:
        data = bytearray(target.data[0][:-32])
        # among keys or values: with an engine they follow its mark
        engine = data.find(b"KGVM")
        start = engine + 2000 if engine > 0 else len(data) * 4 // 7
        data[start : start + 1000] = b"\xff" * 1000
        assert target.load(bytes(data) + hashlib.sha256(data).digest(), False) == "loaded"
        # what was loaded after it says what it said before
        assert target._answer() == target.answer
    finally:
        target.close()
