"""What a script needs beside the package, said before it begins."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

STOCK = ("cmake", "ninja")
"""What building the stock library needs: programs, which packages bring too."""


def need(*packages: str, programs: Sequence[str] = ()) -> None:
    """Leave with one sentence if packages that can be imported, or programs, are missing."""
    missing = [name for name in packages if find_spec(name) is None]
    beside = str(Path(sys.executable).parent)
    for name in programs:
        if shutil.which(name) is None and shutil.which(name, path=beside) is None:
            missing.append(name)
    if missing:
        script = Path(sys.argv[0]).name
        sys.exit(f"{script} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
