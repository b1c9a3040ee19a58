"""Every benchmark starts, from any folder, with the package as it is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.stem)
def test_it_starts(file: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(file), "--help"], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout
    # only the tests' own modules may come from the clone
    assert 'ROOT / "python"' not in file.read_text(encoding="utf-8")
