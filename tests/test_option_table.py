"""One table of options: the library, the struct, Python and the docstrings say the same."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest

from kvmerge.errors import LibraryError, OptionError
from kvmerge.native import header
from kvmerge.policies import Policy, options
from kvmerge.policies.options import OPTIONS, Flag, Number, Option, Whole, Word
from random_model import Shape, write_random_model
from session import Session

ROOT = Path(__file__).resolve().parents[1]
HINTS = {Word: str, Whole: int, Number: float, Flag: bool}
ONE_MORE = r"""
KVMERGE_OPTION(float, extra, 0.5, 0, 2, "more",
    "An option \"more\", "
    "in two lines.")
"""


def limits(option: Option) -> tuple[float, float]:
    """Return the range of an option in the library."""
    if isinstance(option, Word):
        return min(option.values.values()), max(option.values.values())
    if isinstance(option, Flag):
        return 0, 1
    return option.low, option.high


@pytest.fixture
def include(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the header's folder, which is what is read."""
    folder = Path(shutil.copytree(header.folder(), tmp_path / "include"))
    monkeypatch.setattr(header, "folder", lambda: folder)
    for cached in (header._text, header.rows):
        cached.cache_clear()
    yield folder
    for cached in (header._text, header.rows):
        cached.cache_clear()


def with_one_more(folder: Path) -> None:
    table = folder / "kvmerge-options.def"
    table.write_text(table.read_text().replace("\n#undef", f"\n{ONE_MORE}\n#undef"))


def test_every_row_is_a_field_of_a_policy() -> None:
    hints = get_type_hints(Policy)
    assert len(OPTIONS) > 20
    assert [field.name for field in fields(Policy)] == list(OPTIONS)
    for name, option in OPTIONS.items():
        assert hints[name] is HINTS[type(option)], name
        assert getattr(Policy(), name) == option.default, name
        assert option.problem(option.default) is None, name


def test_the_library_refuses_what_the_table_does(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model.gguf", Shape(layers=1))
    with Session(model, merge={}) as session:
        for name, option in OPTIONS.items():
            if isinstance(option, Flag) or option.param in ("move_keys", "pool_max"):
                continue  # a bool of C has no value that could be refused
            low, high = limits(option)
            for value in (low - 1, high + 1):
                with pytest.raises(OptionError) as refused:
                    session.engine.set_params({option.param: value})
                said = f"{option.param} is {value:g}, accepted is {low:g} to {high:g}"
                assert str(refused.value) == said, name
            for value in (low, high):
                # What sizes buffers is refused for another reason.
                try:
                    session.engine.set_params({option.param: value})
                except OptionError as error:
                    assert option.param in ("score", "select", "n_window", "n_flow_rows"), name
                    assert f"accepted is {low:g}" not in str(error)


def documented(policy: type[Policy]) -> Iterator[tuple[str, str, str]]:
    """Yield name, type and text of every parameter in a docstring."""
    _, _, listed = (inspect.getdoc(policy) or "").partition("Parameters\n----------\n")
    for found in re.finditer(r"^(\w+) : (.*)\n((?:    .*\n?)+)", listed, re.MULTILINE):
        yield found[1], found[2], " ".join(found[3].split())


def test_help_lists_every_option() -> None:
    found = {name: kind for name, kind, _ in documented(Policy)}
    assert list(found) == list(OPTIONS)
    assert found["window"] == "int from 1 to 256, default 16"
    assert found["keys"] == "{'keep', 'move'}, default 'move'"


@pytest.mark.parametrize("name", sorted(name for name in Policy.named))
def test_docstrings_of_methods_say_what_the_table_says(name: str) -> None:
    method = Policy.named[name]
    for parameter, kind, text in documented(method):
        option = OPTIONS[parameter]
        stated, _, preset = kind.partition(", default ")
        assert preset == "" or preset == str(getattr(method(), parameter)), (parameter, kind)
        if isinstance(option, Word):
            words = re.findall(r'"(\w+)"', stated)
            assert words and set(words) <= set(option.values), (parameter, kind)
        else:
            assert stated == HINTS[type(option)].__name__, (parameter, kind)
        if isinstance(option, (Whole, Number)):
            assert f"{option.low:g} to {option.high:g}" in text, (parameter, text)


def test_a_new_option_is_one_row(include: Path, tmp_path: Path) -> None:
    """The struct, its default and its range in C++, and the option in Python follow from it."""
    with_one_more(include)
    row = header.rows()[-1]
    option = options._option(row)
    assert option == Number("extra", 'An option "more", in two lines.', 0.5, 0.0, 2.0)
    assert row.option == "more"
    assert re.search(r"float text_pivots;\s*float extra;", header.declarations())

    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    main = tmp_path / "main.cpp"
    main.write_text(
        """
        #include "kvmerge-error.h"
        #include "kvmerge-params.h"
        #include <cstdio>
        int main() {
            kvmerge_params params = kvmerge_params_default();
            std::printf("%g\\n", params.extra);
            params.extra = 2.5f;
            kvmerge_check_params(params);
            std::puts(kvmerge_error_text());
        }
        """
    )
    program = tmp_path / "main"
    sources = [ROOT / "cpp" / "src" / f"kvmerge-{name}.cpp" for name in ("params", "error")]
    subprocess.run(
        [compiler, "-std=c++17", f"-I{include}", f"-I{ROOT / 'cpp' / 'src'}", main, *sources]
        + ["-o", program],
        check=True,
    )
    said = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    assert said.splitlines() == ["0.5", "extra is 2.5, accepted is 0 to 2"]


@pytest.mark.parametrize(
    "broken", ["KVMERGE_OPTION(float, extra, 0.5, 0)\n", ONE_MORE.replace('"more"', "more")]
)
def test_a_row_that_cannot_be_read_is_not_passed_over(include: Path, broken: str) -> None:
    table = include / "kvmerge-options.def"
    table.write_text(table.read_text() + broken)
    with pytest.raises(LibraryError, match="rows that cannot be read"):
        header.rows()


@pytest.mark.parametrize("name", ["kvmerge.h", "kvmerge-options.def"])
def test_a_file_that_is_not_there(include: Path, name: str) -> None:
    (include / name).unlink()
    with pytest.raises(LibraryError, match=rf"{name} cannot be read .*install the package again"):
        header.declarations()


@pytest.mark.parametrize(
    ("compiler", "standard"), [("cc", "c99"), ("cc", "c11"), ("c++", "c++11"), ("c++", "c++20")]
)
def test_the_header_is_c_and_cpp(compiler: str, standard: str, tmp_path: Path) -> None:
    found = shutil.which(compiler)
    if found is None:
        pytest.skip(f"there is no {compiler}")
    source = tmp_path / ("main.c" if compiler == "cc" else "main.cpp")
    source.write_text(
        '#include "kvmerge.h"\n#include "kvmerge.h"\n'
        "int main(void) { struct kvmerge_params p = { sizeof(p) }; return p.text_pivots > 0; }\n"
    )
    command = [found, f"-std={standard}", "-Wall", "-pedantic-errors", "-Werror", "-fsyntax-only"]
    subprocess.run([*command, f"-I{header.folder()}", source], check=True)
