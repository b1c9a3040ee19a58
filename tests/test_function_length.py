"""No function of ours is longer than what fits on a page or two."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MOST_LINES = 100

CONTAINER = re.compile(r"(namespace|struct|class|enum|union|extern)\b")
"""What a block begins with that is no function: it is looked into instead."""
BETWEEN = re.compile(r"template|(public|private|protected):$")

CPP = [
    path
    for folder in ("src", "server", "include")
    for path in (ROOT / "cpp" / folder).glob("*.*")
    if path.suffix in (".cpp", ".h")
]
PYTHON = [
    path
    for folder in ("python", "vendor", "tools", "tests", "benchmarks", "examples")
    for path in (ROOT / folder).rglob("*.py")
    if "_vendor" not in path.parts
]


def cpp_functions(lines: list[str], first: int = 1, depth: int = 0) -> Iterator[tuple[int, str]]:
    """Yield the number of lines and the heading of the functions of a formatted source.

    A block ends with the first brace that stands where its heading begins, so no grammar is needed.

    Parameters
    ----------
    lines
        Of the source, or of what a namespace or struct contains.
    first
        Number of the first of them.
    depth
        Spaces in front of a heading.
    """
    start = None
    for i, line in enumerate(lines):
        text = line[depth:]
        if line[:depth].strip() or not text or text[0] in " #/" or BETWEEN.match(text):
            continue
        if text[0] != "}":
            start = i if text[0] != "{" or start is None else start
            continue
        if start is not None and CONTAINER.match(lines[start].strip()):
            inside = 0 if "namespace" in lines[start] or "extern" in lines[start] else 4
            yield from cpp_functions(lines[start + 1 : i], first + start + 1, depth + inside)
        elif start is not None:
            yield i - start + 1, f"{first + start}: {lines[start].strip()}"
        start = None


def python_functions(source: str) -> Iterator[tuple[int, str]]:
    """Yield the number of lines and the name of the functions of a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (node.end_lineno or 0) - node.lineno + 1, f"{node.lineno}: {node.name}"


def functions(path: Path) -> Iterator[tuple[int, str]]:
    source = path.read_text(encoding="utf-8")
    return python_functions(source) if path.suffix == ".py" else cpp_functions(source.splitlines())


@pytest.mark.parametrize("paths", [CPP, PYTHON], ids=["C++", "Python"])
def test_no_function_is_long(paths: list[Path]) -> None:
    lengths = [
        (n, f"{path.relative_to(ROOT)}:{heading}")
        for path in paths
        for n, heading in functions(path)
    ]
    assert len(lengths) > 100, "the functions are not found"
    assert [f"{n} lines, {heading}" for n, heading in lengths if n > MOST_LINES] == []


def test_lengths_are_counted() -> None:
    source = """
namespace {

struct shape {
    int n = 0;

    int area(
            int height) const {
        if (n > 0) {
            return n*height;
        }
        return 0;
    }
};

} // namespace

static const int sizes[] = {
    1,
};

int run(int n) {
#ifdef DEBUG
    print(n);
#endif
    return n;
}
"""
    lengths = {heading.split(": ")[1]: n for n, heading in cpp_functions(source.splitlines())}
    assert lengths == {
        "int area(": 7,
        "static const int sizes[] = {": 3,
        "int run(int n) {": 6,
    }
