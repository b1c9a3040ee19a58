#!/usr/bin/env python3
"""Fetch, verify, unpack and patch the llama.cpp tree that kvmerge is built from.

With no option it prints the path of the patched tree, making it when it is not there yet. Trees
live in a cache folder under a name that is a hash of what goes into them (the pinned archive and
the text of every patch), so a tree that exists is right and nothing is done twice.

Needs only the standard library, git (or patch), and pip for the first download.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

# Parts of the archive that no build needs; they are two thirds of its size.
UNUSED = ("docs/", "media/", "benches/", "models/")
UPSTREAM = "vendor/llama.cpp/"


class PrepareError(Exception):
    """Something the user can mend; the text says what and how."""


@dataclasses.dataclass(frozen=True)
class Pin:
    """The pinned sdist: what `requirements.txt` says."""

    name: str
    version: str
    sha256: str

    @classmethod
    def read(cls, path: Path) -> Pin:
        pattern = r"^([\w.-]+)==(\S+)\s+--hash=sha256:([0-9a-f]{64})\s*$"
        found = re.findall(pattern, path.read_text(), re.MULTILINE)
        if len(found) != 1:
            raise PrepareError(
                f"{path} must hold exactly one line 'name==version --hash=sha256:<64 hex digits>', "
                f"found {len(found)}. Restore it from version control."
            )
        return cls(*found[0])

    @property
    def stem(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}"

    @property
    def filename(self) -> str:
        return f"{self.stem}.tar.gz"


@dataclasses.dataclass(frozen=True)
class Patch:
    """One file of the series."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    def hunks(self) -> Iterator[tuple[str, str]]:
        """Yield (file, changed line) for every added or removed line."""
        file, remaining = "", [0, 0]
        for line in self.text.splitlines():
            if any(n > 0 for n in remaining):
                if line[:1] in ("+", "-"):
                    yield file, line
                # A context line may have lost its leading blank when it is empty.
                remaining[0] -= line[:1] in ("-", " ", "")
                remaining[1] -= line[:1] in ("+", " ", "")
            elif line.startswith("+++ "):
                file = line[4:].split("\t")[0].removeprefix("b/")
            elif match := re.match(r"@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@", line):
                remaining = [1 if n is None else int(n) for n in match.groups()]


def read_series(folder: Path) -> list[Patch]:
    """Return the patches that `series` names, in its order."""
    series = folder / "series"
    if not series.is_file():
        return []
    names = [line.split("#")[0].strip() for line in series.read_text().splitlines()]
    patches = [Patch(folder / name) for name in names if name]
    if missing := [p.name for p in patches if not p.path.is_file()]:
        raise PrepareError(f"{series} names {', '.join(missing)}, not found beside it.")
    return patches


# --- getting the archive -------------------------------------------------------------------------


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def verify(path: Path, pin: Pin) -> Path:
    """Return `path` when it is the pinned archive, else raise."""
    if not path.is_file():
        raise PrepareError(f"There is no file {path}. Check the path, or unset KVMERGE_SDIST.")
    actual = sha256_of(path)
    if actual != pin.sha256:
        raise PrepareError(
            f"{path} is not the pinned {pin.name} {pin.version}: its sha256 is {actual}, "
            f"requirements.txt wants {pin.sha256} ({path.stat().st_size} bytes: a broken download "
            "or another release). Delete it and run again to fetch the right one."
        )
    return path


def pip_commands(scratch: Path) -> Iterator[list[str]]:
    """Yield ways to call pip, best first.

    An isolated build environment often has no pip of its own, and hides the one around it with
    PYTHONPATH: `-I` looks past that. The last resort is a virtual environment from the standard
    library, which brings pip along.
    """
    yield [sys.executable, "-I", "-m", "pip"]
    for name in ("python3", "python"):
        for prefix in (sys.base_prefix, sys.exec_prefix):
            if (python := shutil.which(name, path=str(Path(prefix, "bin")))) is not None:
                yield [python, "-I", "-m", "pip"]
        if (python := shutil.which(name)) is not None:
            yield [python, "-I", "-m", "pip"]
    for name in ("pip3", "pip"):
        if (pip := shutil.which(name)) is not None:
            yield [pip]
    venv = scratch / "venv"
    made = subprocess.run([sys.executable, "-I", "-m", "venv", str(venv)], capture_output=True)
    if made.returncode == 0:
        folder = "Scripts" if os.name == "nt" else "bin"
        yield [str(venv / folder / "python"), "-I", "-m", "pip"]


def download(requirements: Path, pin: Pin, target: Path) -> Path:
    """Fetch the pinned sdist with the user's own pip, through whatever index that is set up for."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # What the pip around this build tells its children must not reach the pip called here; and the
    # flags meant for our build are none of the business of reading the sdist's metadata.
    hidden = ("PYTHONPATH", "PIP_BUILD_TRACKER", "PIP_REQ_TRACKER", "CMAKE_ARGS")
    env = {k: v for k, v in os.environ.items() if k not in hidden}
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as name:
        scratch = Path(name)
        for pip in pip_commands(scratch):
            try:
                probe = subprocess.run([*pip, "--version"], env=env, capture_output=True)
            except OSError:
                continue
            if probe.returncode == 0:
                break
        else:
            raise PrepareError(
                f"The source of llama.cpp ({pin.filename}) has to be downloaded, and no pip was "
                "found to do it with. Install pip (python -m ensurepip), or put the file into "
                f"{HERE} or name it with KVMERGE_SDIST=path."
            )
        print(f"fetching {pin.filename} with pip", file=sys.stderr)
        run = subprocess.run(
            [*pip, "download", "--no-deps", "--no-binary", pin.name, "--require-hashes"]
            + ["--disable-pip-version-check", "--quiet", "-r", str(requirements)]
            + ["-d", str(scratch / "got")],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        got = scratch / "got" / pin.filename
        if run.returncode != 0 or not got.is_file():
            lines = [line for line in run.stdout.splitlines() if line.strip()]
            errors = [line for line in lines if line.startswith("ERROR")] or lines[-3:]
            raise PrepareError(
                f"pip could not download {pin.filename}: {' '.join(errors)[:600] or 'no output'}. "
                "Check that pip can reach its index (PIP_INDEX_URL, PIP_PROXY), or on a machine "
                f"without one put the file into {HERE} or name it with KVMERGE_SDIST=path."
            )
        os.replace(verify(got, pin), target)
    return target


def find_sdist(requirements: Path, cache: Path) -> Path:
    """Return the verified archive: the user's own, the one kept in the cache, or a fresh one."""
    pin = Pin.read(requirements)
    if given := os.environ.get("KVMERGE_SDIST"):
        return verify(Path(given), pin)
    if (beside := requirements.parent / pin.filename).is_file():
        return verify(beside, pin)
    kept = cache / pin.filename
    if kept.is_file():
        if sha256_of(kept) == pin.sha256:
            return kept
        kept.unlink()
    return download(requirements, pin, kept)


# --- making a tree -------------------------------------------------------------------------------


def unpack(archive: Path, pin: Pin, target: Path, full: bool = False) -> None:
    """Unpack llama.cpp and the Python layer (for its tests) from the archive into `target`."""

    def wanted(name: str) -> bool:
        inside = name.partition("/")[2]
        if inside.startswith(UPSTREAM):
            inside = inside.removeprefix(UPSTREAM)
            # Its .git is a submodule's pointer to nowhere.
            return inside != ".git" and (full or not inside.startswith(UNUSED))
        return inside == "LICENSE.md" or inside.startswith(("llama_cpp/", "tests/"))

    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                if not wanted(member.name):
                    continue
                inside = member.name.partition("/")[2]
                if ".." in Path(inside).parts:
                    raise PrepareError(f"{archive} holds a path that leaves its folder: {inside}.")
                member.name = inside
                if member.isfile() or member.isdir():
                    # The stored owner and mode mean nothing here.
                    member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
                    tar.extract(member, target, set_attrs=member.isfile(), numeric_owner=True)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise PrepareError(
            f"{archive} cannot be unpacked ({error}): the file is truncated or the disk is full. "
            "Delete it and run again to fetch it anew."
        ) from error
    if not (target / UPSTREAM / "CMakeLists.txt").is_file():
        raise PrepareError(f"{archive} holds no llama.cpp tree at {pin.stem}/{UPSTREAM}.")


def apply_patch(patch: Patch, tree: Path) -> None:
    """Apply one patch to an unpacked llama.cpp tree, or raise with the first file that refuses."""
    # A ceiling keeps git from taking the tree for a part of the repository around it, in which
    # case it would skip every file without a word.
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(tree.resolve().parent), "LC_ALL": "C"}
    if git := shutil.which("git"):
        command = [git, "apply", "--whitespace=nowarn", str(patch.path.resolve())]
    elif program := shutil.which("patch"):
        command = [program, "-p1", "--batch", "--forward", "--fuzz=0", "-i"]
        command.append(str(patch.path.resolve()))
    else:
        raise PrepareError("Patching llama.cpp needs git or patch, and neither is installed.")
    run = subprocess.run(
        command, cwd=tree, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if run.returncode == 0:
        return
    refused = re.search(r"^error: patch failed: (.+?):\d+$", run.stdout, re.MULTILINE)
    if refused is None and " FAILED " in run.stdout:
        # patch(1) names the file before the hunks that fail.
        before = run.stdout[: run.stdout.index(" FAILED ")]
        refused = list(re.finditer(r"^patching file '?(.+?)'?$", before, re.MULTILINE))[-1]
    where = refused.group(1) if refused else run.stdout.strip().splitlines()[-1]
    raise PrepareError(
        f"The patch {patch.name} does not apply to llama.cpp; the first file that refuses is "
        f"{where}. After a change of the pin, rebase the series (vendor/README.md)."
    )


def tree_key(pin: Pin, patches: list[Patch], full: bool) -> str:
    digest = hashlib.sha256(f"{pin.sha256} {full}\n".encode())
    for patch in patches:
        digest.update(hashlib.sha256(patch.path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def make_tree(requirements: Path, patches: list[Patch], cache: Path, full: bool = False) -> Path:
    """Return the llama.cpp folder with these patches applied, making it when it is missing."""
    pin = Pin.read(requirements)
    target = cache / tree_key(pin, patches, full)
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        archive = find_sdist(requirements, cache)
        # Made aside and renamed, so that a tree which exists is whole.
        with tempfile.TemporaryDirectory(dir=cache, prefix=".tree-") as name:
            made = Path(name, "tree")
            unpack(archive, pin, made, full)
            for patch in patches:
                apply_patch(patch, made / UPSTREAM)
            try:
                os.rename(made, target)
            except OSError:
                if not target.is_dir():  # else another process was first: its tree is the same
                    raise
    return target / UPSTREAM


# --- working on the series -----------------------------------------------------------------------


def git(*arguments: str, cwd: Path, check: bool = True) -> str:
    identity = ("-c", "user.name=kvmerge", "-c", "user.email=kvmerge@localhost")
    if subprocess.run(["git", "config", "user.email"], cwd=cwd, capture_output=True).stdout.strip():
        identity = ()
    run = subprocess.run(["git", *identity, *arguments], cwd=cwd, capture_output=True, text=True)
    if check and run.returncode != 0:
        said = (run.stderr or run.stdout).strip()[:800]
        raise PrepareError(f"git {arguments[0]} failed in {cwd}: {said}")
    return run.stdout.strip()


def develop(folder: Path, requirements: Path, patches: list[Patch], cache: Path) -> None:
    """Make `folder` a git repository of llama.cpp: a pristine commit, then one per patch."""
    if folder.exists() and any(folder.iterdir()):
        raise PrepareError(f"{folder} exists and is not empty: name a new folder.")
    pristine = make_tree(requirements, [], cache)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(pristine, folder, dirs_exist_ok=True)
    git("init", "--quiet", cwd=folder)
    git("add", "--all", "--force", cwd=folder)
    pin = Pin.read(requirements)
    git("commit", "--quiet", "-m", f"llama.cpp of {pin.name} {pin.version}", cwd=folder)
    git("tag", "pristine", cwd=folder)
    for patch in patches:
        if patch.text.startswith("From "):
            git("am", "--quiet", "--whitespace=nowarn", str(patch.path.resolve()), cwd=folder)
        else:
            apply_patch(patch, folder)
            git("add", "--all", cwd=folder)
            git("commit", "--quiet", "-m", patch.path.stem, cwd=folder)


def export(folder: Path, patches: Path) -> list[str]:
    """Write the commits after `pristine` back as the series; return its names."""
    if git("status", "--porcelain", cwd=folder):
        raise PrepareError(f"{folder} has changes that are not committed: commit or stash them.")
    with tempfile.TemporaryDirectory() as scratch:
        plain = ("--no-signature", "--zero-commit", "--no-numbered", "--no-stat", "--abbrev=10")
        git("format-patch", *plain, "-o", scratch, "pristine..HEAD", cwd=folder)
        made = sorted(Path(scratch).glob("*.patch"))
        patches.mkdir(parents=True, exist_ok=True)
        for old in patches.glob("*.patch"):
            old.unlink()
        for new in made:
            shutil.copyfile(new, patches / new.name)
    (patches / "series").write_text("".join(f"{p.name}\n" for p in made))
    return [p.name for p in made]


def count(patches: list[Patch]) -> str:
    """Return a table of the upstream lines that each patch adds and removes."""
    rows, total = [], [0, 0]
    for patch in patches:
        signs = [line[0] for _, line in patch.hunks()]
        added, removed = signs.count("+"), signs.count("-")
        total = [total[0] + added, total[1] + removed]
        rows.append(f"{added:5} {removed:5}  {patch.name}")
    return "\n".join(["added  removed", *rows, f"{total[0]:5} {total[1]:5}  total"])


def check_hooks(tree: Path, patches: list[Patch]) -> None:
    """Raise unless `tree` is a llama.cpp whose hooks are in.

    Every file to which the series adds a line that names kvmerge must name it too: enough to tell
    a stock tree from a patched one, and no hindrance to somebody who works on the series there.
    """
    if not (tree / "src" / "llama-kv-cache.cpp").is_file():
        raise PrepareError(f"{tree} is not a llama.cpp tree: it has no src/llama-kv-cache.cpp.")

    def names_us(text: str) -> bool:
        return "kvmerge" in text.lower()

    changes = [change for patch in patches for change in patch.hunks()]
    hooked = {file for file, line in changes if line.startswith("+") and names_us(line)}
    bare = [f for f in sorted(hooked) if not names_us((tree / f).read_text(errors="replace"))]
    if bare:
        raise PrepareError(
            f"The llama.cpp tree {tree} lacks kvmerge's hooks in {', '.join(bare)}. Apply the "
            "patches in vendor/patches to it, or make a fresh one with prepare.py --develop."
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--pristine", action="store_true", help="print the unpatched tree instead")
    action.add_argument("--develop", type=Path, metavar="DIR", help="make a git tree to work in")
    action.add_argument("--export", type=Path, metavar="DIR", help="write its commits back")
    action.add_argument("--count", action="store_true", help="count the lines the series changes")
    action.add_argument("--check", type=Path, metavar="DIR", help="check that the hooks are in DIR")
    parser.add_argument("--full", action="store_true", help="unpack what only tests need")
    parser.add_argument("--requirements", type=Path, default=HERE / "requirements.txt")
    parser.add_argument("--patches", type=Path, default=HERE / "patches")
    default_cache = os.environ.get("KVMERGE_VENDOR_CACHE") or ROOT / "build" / "vendor"
    parser.add_argument("--cache", type=Path, default=Path(default_cache))
    args = parser.parse_args(arguments)
    cache = args.cache.resolve()
    try:
        if args.export:
            print("\n".join(export(args.export, args.patches)))
            return 0
        patches = [] if args.pristine else read_series(args.patches)
        if args.count:
            print(count(patches))
        elif args.check:
            check_hooks(args.check, patches)
        elif args.develop:
            develop(args.develop, args.requirements, patches, cache)
            print(args.develop.resolve())
        else:
            print(make_tree(args.requirements, patches, cache, args.full))
    except PrepareError as error:
        print(f"vendor/prepare.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
