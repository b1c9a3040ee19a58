"""Every script that README and docs name runs, from any folder, with the package as installed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvmerge import pocket
from random_model import Shape, write_random_model

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("tools/*.py")])

SHORT = {
    "ask_many": "--pictures 2 --questions 2 --max-tokens 4 --rounds 1",
    "decode_speed": "--tokens 320 --layers 1 --rounds 1 --threads 1",
    "fit_accuracy": "--quick",
    "layer_budgets": "--rounds 1",
    "many_pictures": "--chats 1 --policies auto",
    "memory": "--tokens 1024 --layers 1 --threads 1",
    "merge_cost": "auto h2o --tokens 1024 --layers 1 --rounds 1 --threads 1",
    "merge_error": "--pictures 2 --prompts 1 --methods auto",
    "picture_path": "--quick",
    "picture_reading": "--quick --rounds 1",
    "quality": "--quick --jobs 1 --out {folder}/answers",
    "server": "--clients 2 --pictures 2 --questions 1 --cancelled 2 --kv-max-cells 1024",
    "small_machine": "--pictures 2 --limits 0",
    "soak": "--requests 10 --warm-up 5",
    "tables": "{folder} {folder} --quick --only pocket-errors --out {folder}/tables",
    "text_fidelity": "{model} {folder} --read 32 --n 1 --methods flowmm --kept 0.5",
    "architectures": "--models {folder}",
    "presets": "--check",
    "fuzz_states": "--no-build --plain --libraries {libraries} --states 6 --jobs 1",
}
"""What makes each of them short.  What they find is not looked at: the machine may be busy."""

TAKES_MINUTES = ["album", "rpc_tests", "upstream_server_tests", "upstream_tests"]
TRIED_ELSEWHERE = ["supports_op"]
"""By a test of its own, which also reads what it prints."""


def started(file: Path, *options: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(file), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=600)


def test_all_are_known() -> None:
    assert {file.stem for file in FILES} == {*SHORT, *TAKES_MINUTES, *TRIED_ELSEWHERE}


def test_docs_name_what_is_there() -> None:
    """Also the other way round: what they name is tried here."""
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    named = {
        match
        for page in pages
        for match in re.findall(r"(?:benchmarks|tools)/\w+\.py", page.read_text(encoding="utf-8"))
    }
    assert named <= {str(file.relative_to(ROOT).as_posix()) for file in FILES}
    assert len(named) >= 12


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.stem not in TRIED_ELSEWHERE], ids=lambda file: file.stem
)
def test_it_is_of_no_tree(file: Path, tmp_path: Path) -> None:
    """Only the tests' own modules may come from the clone."""
    result = started(file, "--help", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout
    assert 'path[:0] = [str(ROOT / "python")' not in file.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SHORT)
def test_it_runs(name: str, tmp_path: Path) -> None:
    file = next(file for file in FILES if file.stem == name)
    (tmp_path / "text.txt").write_text("The boat went down the river to the sea. " * 80)
    if name == "architectures":
        write_random_model(tmp_path / "llama-dense.gguf", Shape(context=512))
    places = {
        "folder": tmp_path,
        "model": pocket.model_path(),
        "libraries": Path(sys.modules["kvmerge"].__file__ or "").parent / "lib",
    }
    result = started(file, *SHORT[name].format(**places).split(), folder=tmp_path)
    said = result.stdout + result.stderr
    assert "Traceback" not in said, said[-3000:]
    assert result.returncode in (0, 1), said[-3000:]
    assert re.search(r"\d", result.stdout), said[-3000:]


@pytest.mark.slow
def test_upstream_tests_run(tmp_path: Path) -> None:
    result = started(ROOT / "tools" / "upstream_tests.py", folder=tmp_path)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


WITHOUT = """
import runpy, sys
from importlib import util
found = util.find_spec
util.find_spec = lambda name, *more: None if name == "gguf" else found(name, *more)
file = sys.argv[1]
sys.argv = sys.argv[1:]
runpy.run_path(file, run_name="__main__")
"""


@pytest.mark.parametrize(
    "name", ["decode_speed", "fit_accuracy", "layer_budgets", "merge_cost", "picture_reading"]
)
def test_without_a_package(name: str, tmp_path: Path) -> None:
    file = ROOT / "benchmarks" / f"{name}.py"
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(file)], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 1
    assert result.stderr == f"{name}.py needs gguf: pip install gguf\n"
