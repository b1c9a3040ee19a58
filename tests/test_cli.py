"""The ``kvmerge`` command."""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmerge import __version__, cli, pocket

HEAVY = {"cffi", "jinja2", "llama_cpp", "matplotlib", "numpy", "PIL"}
WHOLE_RUNS = {
    "chat": [str(pocket.model_path())],
    "demo": ["--quick"],
    "doctor": [],
    "eval": ["--methods", "help"],
    "fit": [str(pocket.model_path())],
    "rpc-server": ["--help"],
    "serve": ["--help"],
    "version": [],
}


def command(
    *arguments: str, cwd: Path | None = None, python: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *python, "-m", "kvmerge", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env=os.environ | environment,
    )


def test_help_loads_nothing_heavy() -> None:
    result = command("--help", python=("-X", "importtime"))
    assert result.returncode == 0, result.stderr
    assert all(name in result.stdout for name in cli.COMMANDS)
    imported = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines()}
    assert "kvmerge.cli" in imported
    assert not imported & HEAVY


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert name in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version"]) == 0
    assert __version__ in capsys.readouterr().out


def test_doctor() -> None:
    result = command("doctor")
    assert result.returncode == 0, result.stderr
    assert "patched            yes" in result.stdout
    assert "device             CPU" in result.stdout


def test_doctor_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMERGE_LIB_PATH", str(tmp_path))
    result = command("doctor")
    assert result.returncode == 1
    assert result.stderr.startswith("kvmerge doctor: ")
    assert "Traceback" not in result.stderr


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["dmo"])
    assert stop.value.code == 2
    assert "demo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--policy", "flowm"], "Did you mean 'flowmm'?"),
        (["--policy", "none"], "must merge"),
        (["--model", "nowhere.gguf"], "go together"),
        (["--model", "nowhere.gguf", "--mmproj", "nowhere.gguf"], "does not exist"),
        (["--report", "nowhere/report.html"], "there is no folder nowhere"),
        (["--report", "."], "it is a folder"),
    ],
)
def test_bad_options(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", *options]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--image-merge=0.9", "--image-min-tokens=8"])
def test_pictures_need_a_vision_part(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", str(pocket.model_path()), option]) == 1
    assert f"{option.partition('=')[0]} needs --mmproj" in capsys.readouterr().err


def test_what_a_cosine_may_be_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("chat", "demo", "eval"):
        with pytest.raises(SystemExit):
            cli.main([name, *(["model.gguf"] if name == "chat" else []), "--image-merge", "1.5"])
        said = capsys.readouterr().err
        assert "argument --image-merge: must be a cosine above 0 and at most 1" in said
        assert "'1.5'" in said


def is_text(action: argparse.Action) -> bool:
    try:
        return isinstance(action.type("a name")[0], str)  # type: ignore[misc, operator]
    except argparse.ArgumentTypeError:
        return False


def options_with_a_range() -> Iterator[Any]:
    for name in cli.COMMANDS:
        commands = next(
            action
            for action in cli.parser(name)._actions
            if isinstance(action, argparse._SubParsersAction)
        )
        for action in commands.choices[name]._actions:
            if action.type not in (None, Path) and action.option_strings and not is_text(action):
                yield pytest.param(name, action, id=f"{name} {action.option_strings[0]}")


# Cells and bytes: more than there are is as good as none.
UNBOUNDED = ("--memory", "--kv-max-cells", "--budget", "--kv-budget")

# No option takes any of these: not of a number, an amount, a size, or a list of them.
NONSENSE = (
    "-1000000", "-1.5", "-0.5", "", " ", "nan", "inf", "-inf", "abc", "1e400", "0x10", "1,,x", "²",
    "9" * 5000, str(2**63), str(2**64), str(10**30), "-" + str(2**31),
)  # fmt: skip


@pytest.mark.parametrize(("name", "action"), list(options_with_a_range()))
def test_what_is_out_of_range_is_refused_with_the_range(
    name: str, action: argparse.Action, capsys: pytest.CaptureFixture[str]
) -> None:
    option = action.option_strings[0]
    needed = ["model.gguf"] if name in ("fit", "chat") else []
    for text in NONSENSE:
        if text.isdecimal() and option in UNBOUNDED:
            continue
        with pytest.raises(SystemExit) as stop:
            cli.main([name, *needed, f"{option}={text}"])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert f"argument {option}" in error
        assert any(said in error for said in ("must be", "is not an amount", "names nothing"))
        assert len(error.splitlines()[-1]) < 400


def test_numbers_that_are_refused_are_those_of_the_table() -> None:
    found = {parameter.id for parameter in options_with_a_range()}
    assert {"demo --seed", "demo --threads", "eval --jobs", "eval --budgets"} < found
    assert {f"{name} --image-merge" for name in ("chat", "demo", "eval")} < found
    assert {f"{name} --image-min-tokens" for name in ("chat", "demo", "eval")} < found
    assert {"fit --ctx", "fit --n-ubatch", "fit --kv-max-cells", "fit --image-max-tokens"} < found


# Where nobody reads, and what cannot be written.


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437", "shift_jis"])
def test_any_encoding_will_do(encoding: str, tmp_path: Path) -> None:
    result = command("demo", "--quick", cwd=tmp_path, PYTHONIOENCODING=encoding)
    assert result.returncode == 0, result.stderr
    assert "(right)" in result.stdout


def test_every_character_has_a_form_in_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert cli.main(["version"]) == 0
    print("✓ ✗ 4×3 −1 …\ud800\U0001f600", flush=True)
    assert written.getvalue().splitlines()[-1] == b"(right) (wrong) 4x3 -1 ...??"


@pytest.mark.skipif(not hasattr(os, "pipe2"), reason="needs a pipe of POSIX")
@pytest.mark.parametrize("name", [*cli.COMMANDS, "--help"])
def test_nobody_reads(name: str, tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [sys.executable, "-m", "kvmerge", name, *WHOLE_RUNS.get(name, [])],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"},
    )
    os.close(write)
    assert result.stderr == ""
    assert result.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written() -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "kvmerge", "version"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert result.returncode == 1
    assert result.stderr.startswith("kvmerge")
    assert result.stderr.endswith(": No space left on device\n")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_nothing_is_left_open(name: str, tmp_path: Path) -> None:
    result = command(name, *WHOLE_RUNS[name], cwd=tmp_path, python=("-X", "dev"))
    assert result.returncode == 0
    assert result.stderr == ""


def test_an_unexpected_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: argparse.Namespace) -> int:
        raise ZeroDivisionError("divided\nby zero")

    monkeypatch.setattr("kvmerge.commands.version.run", fail)
    assert cli.main(["version"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("kvmerge version: ZeroDivisionError: divided by zero")
    assert len(error.splitlines()) == 1
    monkeypatch.setenv(cli.TRACEBACK, "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(["version"])


def test_packages_that_are_missing_are_said_before_the_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    out = tmp_path / "out"
    assert cli.main(["eval", "--out", str(out)]) == 1
    assert "matplotlib: install kvmerge[eval]" in capsys.readouterr().err
    assert not out.exists()


def test_demo(tmp_path: Path) -> None:
    result = command("demo", "--quick", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert max(len(line) for line in result.stdout.splitlines()) <= 100
    for word in ("FULL CACHE", "MERGED (AUTO)", "tokens seen", "cells held", "KV MiB", "✓"):
        assert word in result.stdout
    report = (tmp_path / "kvmerge-demo.html").read_text()
    assert "{{" not in report.replace("{{}}", "")
