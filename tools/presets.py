"""Write the policies for the programs in C++: ``python tools/presets.py``.

llama-cli and llama-mtmd-cli know a policy by its name; its settings are those of Python, which
this writes into cpp/server/kvmerge-presets.h.  With --check nothing is written, and it fails where
they differ.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kvmerge.commands.serve import native_settings
from kvmerge.policies import PRESETS, ArrayPolicy

FILE = Path(__file__).resolve().parent.parent / "cpp" / "server" / "kvmerge-presets.h"
HEAD = """\
#pragma once

// The settings of each policy, as Python has them: written by tools/presets.py.

struct kvmerge_preset {
    const char * name;
    const char * settings;
};

static const kvmerge_preset KVMERGE_PRESETS[] = {
"""


def text() -> str:
    """Return what the file holds."""
    rows = [
        f'    {{ "{name}", "{native_settings(policy)}" }},\n'
        for name, policy in sorted(PRESETS.items())
        if policy is not None and not isinstance(policy, ArrayPolicy)
    ]
    return f"{HEAD}{''.join(rows)}}};\n"


def main() -> None:
    """Write or check it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    if parser.parse_args().check:
        same = FILE.read_text(encoding="utf-8") == text()
        print(f"{len(text().splitlines())} lines, {'as' if same else 'not as'} Python has them")
        sys.exit(not same)
    FILE.write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()
