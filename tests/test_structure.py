"""How the package is built: what imports what and who reaches into whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "kvmerge"

OF_OTHERS = {
    "_base_path": "llama_cpp.llama_cpp",
    "_chat_handlers": "llama_cpp's registry of chat formats",
    "_grammar": "llama_cpp.LlamaGrammar",
    "_root": "llama_cpp.LlamaGrammar",
}
"""Private members of upstream that have no public name, and whose they are."""


@dataclass(frozen=True)
class Module:
    """A module of the package, read and not run."""

    name: str
    is_package: bool
    tree: ast.Module

    @classmethod
    def of(cls, file: Path) -> Module:
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        return cls(name, is_package, ast.parse(file.read_text(encoding="utf-8")))

    def imported(self) -> Iterator[str]:
        """Return full names of what it imports, wherever the statement stands."""
        package = self.name.split(".") if self.is_package else self.name.split(".")[:-1]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) + 1 - node.level] if node.level else []
                source = ".".join([*above, *([node.module] if node.module else [])])
                yield from (f"{source}.{alias.name}" for alias in node.names)

    def own_privates(self) -> set[str]:
        """Return the private names that it defines."""
        names = set()
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
        return {name for name in names if is_private(name)}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@lru_cache(maxsize=1)
def modules() -> dict[str, Module]:
    files = [file for file in PACKAGE.rglob("*.py") if "_vendor" not in file.parts]
    return {module.name: module for module in map(Module.of, files)}


def imports() -> dict[str, set[str]]:
    """Return for every module those that it imports, also inside functions and for types alone."""
    graph: dict[str, set[str]] = {}
    for module in modules().values():
        found = set()
        for name in module.imported():
            # A name in a module, or the module itself.
            target = name if name in modules() else name.rpartition(".")[0]
            if target in modules() and target != module.name:
                found.add(target)
        graph[module.name] = found
    return graph


def test_no_module_imports_one_that_imports_it() -> None:
    graph = imports()
    assert len(graph) > 60 and "kvmerge.cache" in graph["kvmerge.llama"]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@lru_cache(maxsize=1)
def attributes() -> list[tuple[Module, ast.Attribute]]:
    """Return every use of a private member, with the module that it stands in."""
    return [
        (module, node)
        for module in modules().values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Attribute) and is_private(node.attr)
    ]


def places(found: list[tuple[Module, ast.Attribute]]) -> list[str]:
    return [f"{module.name}, line {node.lineno}: {ast.unparse(node)}" for module, node in found]


def test_private_members_are_used_where_they_are_defined() -> None:
    """A class may use its own and those of the class it extends: through ``self`` alone."""
    known = {name: module.own_privates() for name, module in modules().items()}
    found = [
        (module, node)
        for module, node in attributes()
        if node.attr not in known[module.name] | OF_OTHERS.keys()
        if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
        if ast.unparse(node.value) != "super()"
    ]
    named = places(found)
    assert not named


@pytest.mark.parametrize(
    ("owner", "called"),
    [
        ("llama", {"llama", "_llama", "llm", "_llm", "model"}),
        ("cache", {"cache", "_cache", "kv_cache"}),
        ("reading", {"reader", "_reader"}),
    ],
)
def test_nobody_reaches_into_them(owner: str, called: set[str]) -> None:
    """Also where another class happens to have a member of the same name."""
    private = modules()[f"kvmerge.{owner}"].own_privates()
    assert len(private) >= 5
    found = [
        (module, node)
        for module, node in attributes()
        if module.name != f"kvmerge.{owner}" and node.attr in private
        if ast.unparse(node.value).rpartition(".")[2] in called
    ]
    named = places(found)
    assert not named


def test_private_names_are_imported_by_nobody() -> None:
    for module in modules().values():
        for name in module.imported():
            last = name.rpartition(".")[2]
            assert not (name.startswith("kvmerge") and is_private(last)), (module.name, name)
