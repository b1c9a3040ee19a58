"""vendor/prepare.py: every run here is the real program on a small archive of the same shape."""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PREPARE = ROOT / "vendor" / "prepare.py"
STEM = "llama_cpp_python-0.0.1"
SOURCE = "one\ntwo\nthree\n"
PATCH = """\
The hook has a reason.

--- a/src/llama-kv-cache.cpp
+++ b/src/llama-kv-cache.cpp
@@ -1,3 +1,4 @@
 one
-two
+TWO
+kvmerge
 three
"""

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


class Vendor:
    """A vendor folder of its own: requirements, series, archive, cache."""

    def __init__(self, path: Path):
        self.path = path
        self.cache = path / "cache"
        self.patches = path / "patches"
        self.patches.mkdir()
        self.archive = path / "elsewhere.tar.gz"
        with tarfile.open(self.archive, "w:gz") as tar:
            for name, text in {
                "LICENSE.md": "MIT",
                "setup.cfg": "not needed",
                "vendor/llama.cpp/.git": "gitdir: ../nowhere",
                "vendor/llama.cpp/CMakeLists.txt": "project(llama.cpp)",
                "vendor/llama.cpp/docs/big.md": "not needed",
                "vendor/llama.cpp/src/llama-kv-cache.cpp": SOURCE,
            }.items():
                member = tarfile.TarInfo(f"{STEM}/{name}")
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text.encode()))
        self.pin(hashlib.sha256(self.archive.read_bytes()).hexdigest())

    def pin(self, sha256: str) -> None:
        line = f"llama-cpp-python==0.0.1 --hash=sha256:{sha256}\n"
        (self.path / "requirements.txt").write_text(line)

    def series(self, **patches: str) -> None:
        for name, text in patches.items():
            (self.patches / f"{name}.patch").write_text(text)
        (self.patches / "series").write_text("".join(f"{name}.patch\n" for name in patches))

    def run(self, *options: str, sdist: Path | None = None, **env: str):
        command = [sys.executable, str(PREPARE), *options, "--cache", str(self.cache)]
        command += ["--requirements", str(self.path / "requirements.txt")]
        command += ["--patches", str(self.patches)]
        # An index that does not exist: what works here works without a network.
        env = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""} | env
        env.pop("KVMERGE_SDIST", None)
        if sdist is not None:
            env["KVMERGE_SDIST"] = str(sdist)
        return subprocess.run(command, capture_output=True, text=True, env=env)

    def tree(self, *options: str, **named) -> Path:
        done = self.run(*options, **named)
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.strip())

    def refusal(self, *options: str, **named) -> str:
        done = self.run(*options, **named)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert not list(self.cache.glob("*/vendor")), "a failed run must leave no tree behind"
        return done.stderr


@pytest.fixture
def vendor(tmp_path):
    return Vendor(tmp_path)


def hooked(tree: Path) -> str:
    return (tree / "src" / "llama-kv-cache.cpp").read_text()


def test_the_tree_holds_the_patched_source_and_nothing_unused(vendor):
    vendor.series(hook=PATCH)
    tree = vendor.tree(sdist=vendor.archive)
    assert hooked(tree) == "one\nTWO\nkvmerge\nthree\n"
    assert (tree.parent.parent / "LICENSE.md").is_file()
    assert not (tree / ".git").exists()
    assert not (tree / "docs").exists()
    assert not (tree.parent.parent / "setup.cfg").exists()


def test_pristine_is_another_tree_without_the_patches(vendor):
    vendor.series(hook=PATCH)
    patched = vendor.tree(sdist=vendor.archive)
    pristine = vendor.tree("--pristine", sdist=vendor.archive)
    assert pristine != patched
    assert hooked(pristine) == SOURCE


def test_a_changed_patch_makes_another_tree(vendor):
    vendor.series(hook=PATCH)
    first = vendor.tree(sdist=vendor.archive)
    vendor.series(hook=PATCH.replace("+TWO", "+2"))
    second = vendor.tree(sdist=vendor.archive)
    assert first != second
    assert hooked(second) == "one\n2\nkvmerge\nthree\n"


def test_rebuilding_works_offline(vendor):
    vendor.series(hook=PATCH)
    tree = vendor.tree(sdist=vendor.archive)
    assert vendor.tree() == tree  # nothing is needed for a tree that exists
    # A kept archive serves a series that changed.
    shutil.copyfile(vendor.archive, vendor.cache / f"{STEM}.tar.gz")
    vendor.series(hook=PATCH.replace("+TWO", "+2"))
    assert "2\n" in hooked(vendor.tree())


def test_an_archive_beside_the_requirements_is_used(vendor):
    shutil.copyfile(vendor.archive, vendor.path / f"{STEM}.tar.gz")
    assert hooked(vendor.tree()) == SOURCE


def test_without_a_network_it_says_what_to_do(vendor):
    message = vendor.refusal()
    assert f"pip could not download {STEM}.tar.gz" in message
    assert "KVMERGE_SDIST" in message


def test_a_wrong_hash_names_both(vendor):
    actual = hashlib.sha256(vendor.archive.read_bytes()).hexdigest()
    vendor.pin("0" * 64)
    message = vendor.refusal(sdist=vendor.archive)
    assert actual in message
    assert "0" * 64 in message


def test_a_truncated_download_has_a_wrong_hash(vendor):
    short = vendor.path / "short.tar.gz"
    short.write_bytes(vendor.archive.read_bytes()[:-20])
    assert "broken download" in vendor.refusal(sdist=short)


def test_a_truncated_archive_is_not_half_unpacked(vendor):
    # Even when its hash was pinned by mistake.
    short = vendor.path / "short.tar.gz"
    short.write_bytes(vendor.archive.read_bytes()[:-20])
    vendor.pin(hashlib.sha256(short.read_bytes()).hexdigest())
    assert "truncated" in vendor.refusal(sdist=short)


def test_a_kept_archive_that_is_broken_is_fetched_again(vendor):
    vendor.cache.mkdir()
    kept = vendor.cache / f"{STEM}.tar.gz"
    kept.write_bytes(b"broken")
    assert "pip could not download" in vendor.refusal()
    assert not kept.exists()


def test_a_patch_that_does_not_apply_is_named_with_its_file(vendor):
    vendor.series(good=PATCH, bad=PATCH.replace("-two", "-zwei"))
    message = vendor.refusal(sdist=vendor.archive)
    assert "bad.patch does not apply" in message
    assert "src/llama-kv-cache.cpp" in message


@pytest.mark.skipif(shutil.which("patch") is None, reason="patch is not installed")
@pytest.mark.parametrize("text", [PATCH, PATCH.replace("-two", "-zwei")], ids=["good", "bad"])
def test_patch_does_where_git_is_missing(vendor, tmp_path, text):
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "patch").symlink_to(shutil.which("patch"))
    vendor.series(hook=text)
    if text == PATCH:
        assert "kvmerge" in hooked(vendor.tree(sdist=vendor.archive, PATH=str(tools)))
    else:
        message = vendor.refusal(sdist=vendor.archive, PATH=str(tools))
        assert "hook.patch does not apply" in message
        assert "refuses is src/llama-kv-cache.cpp" in message


def test_without_git_and_patch_it_says_so(vendor, tmp_path):
    vendor.series(hook=PATCH)
    assert "needs git or patch" in vendor.refusal(sdist=vendor.archive, PATH=str(tmp_path))


def test_a_series_that_names_a_missing_patch(vendor):
    (vendor.patches / "series").write_text("# comment\nlost.patch\n")
    assert "names lost.patch" in vendor.refusal(sdist=vendor.archive)


def test_count_knows_headers_from_lines(vendor):
    vendor.series(hook=PATCH.replace("The hook", "- a list\n+ in the header\nThe hook"))
    table = vendor.run("--count").stdout.splitlines()
    assert [line.split() for line in table[1:]] == [["2", "1", "hook.patch"], ["2", "1", "total"]]


def test_check_tells_a_stock_tree_from_a_patched_one(vendor):
    vendor.series(hook=PATCH)
    patched = vendor.tree(sdist=vendor.archive)
    pristine = vendor.tree("--pristine", sdist=vendor.archive)
    assert vendor.run("--check", str(patched)).returncode == 0
    done = vendor.run("--check", str(pristine))
    assert done.returncode == 1
    assert "lacks kvmerge's hooks in src/llama-kv-cache.cpp" in done.stderr
    assert "not a llama.cpp tree" in vendor.run("--check", str(vendor.path)).stderr


@needs_git
def test_a_series_survives_develop_and_export(vendor):
    vendor.series(hook=PATCH)
    work = vendor.path / "work"
    assert vendor.run("--develop", str(work), sdist=vendor.archive).returncode == 0
    exported = vendor.run("--export", str(work))
    assert exported.stdout.split() == ["0001-hook.patch"], exported.stderr
    assert (vendor.patches / "series").read_text() == "0001-hook.patch\n"
    assert "kvmerge" in hooked(vendor.tree(sdist=vendor.archive))

    # Exported patches are mails: they come back with their messages.
    again = vendor.path / "again"
    assert vendor.run("--develop", str(again), sdist=vendor.archive).returncode == 0
    log = subprocess.run(["git", "log", "--format=%s"], cwd=again, capture_output=True, text=True)
    assert log.stdout.split("\n")[0] == "hook"

    (again / "src" / "llama-kv-cache.cpp").write_text("not committed\n")
    done = vendor.run("--export", str(again))
    assert done.returncode == 1
    assert "not committed" in done.stderr


def test_the_pin_of_the_project_is_the_version_that_the_package_expects():
    pin = (ROOT / "vendor" / "requirements.txt").read_text()
    version = next(line.split()[0] for line in pin.splitlines() if "==" in line).split("==")[1]
    library = (ROOT / "python" / "kvmerge" / "native" / "library.py").read_text()
    assert f'LLAMA_CPP_PYTHON = "{version}"' in library
