"""Saved states with random damage: refused or sound, and never more than that.

``python tools/fuzz_states.py`` does the same many times over, with sanitizers.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))

from fuzz_states import TARGETS  # noqa: E402


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
