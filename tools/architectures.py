"""Merge a model of every architecture that llama.cpp knows: ``python tools/architectures.py``.

The models are the small random ones that ``tools/upstream_tests.py`` makes.  Each is read in a
process of its own, with and without flash attention and with the CPU treated as a device too;
merged twice by several presets, saved and restored.  Prints which architectures merge and why the
others do not.  Fails when a process dies, an answer is not finite, or a restored state answers
differently.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRESETS = ("mosaic", "flowmm", "h2o", "madakv")
TOKENS = 70
"""Tokens of one piece of the prompt: three pieces are within what the smallest model knows."""


def check(model: Path) -> str:
    """Merge a model in every way; return why it is refused, or nothing."""
    sys.path[:0] = [str(ROOT / "tests")]
    import numpy as np

    from kvmerge.errors import UnsupportedError
    from kvmerge.policies import PRESETS as POLICIES
    from session import Session

    rng = np.random.default_rng(0)
    for name in PRESETS:
        policy = POLICIES[name]
        assert policy is not None
        for flash_attention in (True, False):
            try:
                session = Session(
                    model, merge=policy.engine_params(), n_ctx=256, n_batch=128,
                    flash_attention=flash_attention, swa_full=False, first_cells=256,
                )  # fmt: skip
            except UnsupportedError as error:
                return str(error)
            with session:
                assert session.engine
                words = min(session.n_vocab, 100)
                for budget in (None, 120, 80):
                    before = session.decode(rng.integers(0, words, TOKENS).tolist())
                    if budget:
                        session.engine.merge(budget)
                        cells = session.engine.n_cells()
                        varies = policy.allocate != "uniform"
                        assert cells >= budget if varies else cells == budget, f"{cells} cells"
                state, position = session.save(), session.position
                after = session.decode([1])
                assert np.isfinite(before).all() and np.isfinite(after).all(), "not finite"
                assert session.restore(state), "the state is refused"
                again = session.decode([1], position=position)
                # a sliding window's cells may come back in another order
                same = np.abs(again - after).max() < 1e-4 * np.abs(after).max()
                assert same, "the restored state answers differently"
    return ""


def main() -> int:
    """Check every model of the folder, or one in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=ROOT / "build" / "upstream-tests" / "models")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.model:
        print(check(args.model))
        return 0

    models = sorted(args.models.glob("*.gguf"))
    if not models:
        parser.error(f"{args.models} holds no models: run tools/upstream_tests.py first")
    found: dict[str, list[str]] = defaultdict(list)
    broken = 0
    for model in models:
        for device in (False, True):
            process = subprocess.run(
                [sys.executable, __file__, "--model", model],
                env={**os.environ, **({"KVMERGE_AS_DEVICE": "1"} if device else {})},
                capture_output=True,
                text=True,
            )
            if process.returncode:
                broken += 1
                last = process.stderr.strip().splitlines()[-1:] or [f"exit {process.returncode}"]
                print(f"{model.name}{' as a device' * device}: {last[0]}")
            elif not device:
                found[process.stdout.strip()].append(model.stem.rsplit("-", 1)[0])
    for reason, names in sorted(found.items()):
        print(f"{reason or 'merged'}: {len(names)}: {', '.join(sorted(set(names)))}")
    print(f"{len(models)} models, {broken} broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
