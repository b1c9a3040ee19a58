"""The ``kvmerge`` command."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvmerge import __version__, cli


def command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvmerge", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
    )


def test_help_is_instant() -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = command("--help")
        seconds.append(time.perf_counter() - start)
        assert result.returncode == 0, result.stderr
        assert all(name in result.stdout for name in cli.COMMANDS)
    # 0.3 s on an idle machine; the margin is for a busy one.
    assert min(seconds) < 1.0


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
        (["--budget", "1.5"], "(0, 1]"),
        (["--budget", "big"], "(0, 1]"),
        (["--policy", "flowm"], "Did you mean 'flowmm'?"),
        (["--policy", "none"], "must merge"),
        (["--pictures", "0"], "--pictures must be 1 to"),
        (["--model", "nowhere.gguf"], "go together"),
        (["--model", "nowhere.gguf", "--mmproj", "nowhere.gguf"], "does not exist"),
    ],
)
def test_bad_options(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", *options]) == 1
    assert said in capsys.readouterr().err


def test_demo(tmp_path: Path) -> None:
    result = command("demo", "--quick", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert max(len(line) for line in result.stdout.splitlines()) <= 100
    for word in ("FULL CACHE", "MERGED (AUTO)", "tokens seen", "cells held", "KV MiB", "✓"):
        assert word in result.stdout
    report = (tmp_path / "kvmerge-demo.html").read_text()
    assert "{{" not in report.replace("{{}}", "")
