"""Each example runs, as it stands, on the model in the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "examples"


def run(*command: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_all_are_tried() -> None:
    names = {file.name for file in FOLDER.iterdir() if file.is_file()}
    assert names == {"album.ipynb", "low_memory.py", "server.py"}


def test_low_memory(tmp_path: Path) -> None:
    lines = run(str(FOLDER / "low_memory.py"), folder=tmp_path).splitlines()
    cells = [int(line.split()[2]) for line in lines if line.endswith("MiB") and "tokens," in line]
    assert len(cells) == 16
    assert max(cells) <= 512


def test_server(tmp_path: Path) -> None:
    for name in ("fastapi", "uvicorn", "sse_starlette", "starlette_context", "openai"):
        pytest.importorskip(name)
    pytest.importorskip("pydantic_settings")
    assert run(str(FOLDER / "server.py"), folder=tmp_path).strip()


SHOW = """
import ast, json, sys
names = {}
for cell in json.load(open(sys.argv[1])):
    tree = ast.parse(cell)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    if last is not None:
        shown = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
        print(getattr(shown, "_repr_html_", lambda: "")())
"""


def test_notebook(tmp_path: Path) -> None:
    """Its cells, one after the other; the last expression of each is shown as a notebook does."""
    notebook = json.loads((FOLDER / "album.ipynb").read_text(encoding="utf-8"))
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    (tmp_path / "cells.json").write_text(json.dumps(cells))
    said = run("-c", SHOW, "cells.json", folder=tmp_path)
    assert "% of the full cache" in said
    answers = [line.strip().split("    (right: ") for line in said.splitlines() if "(right" in line]
    assert len(answers) >= 3
    assert sum(right.startswith(answer) for answer, right in answers) >= len(answers) // 2
