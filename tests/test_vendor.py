"""vendor/prepare.py: every run here is the real program on a small archive of the same shape."""

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

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
        self.pack({"src/llama-kv-cache.cpp": SOURCE})

    def pack(self, sources: dict[str, str]) -> None:
        """Make the archive, with these files of llama.cpp."""
        inside = {"CMakeLists.txt": "project(llama.cpp)", "docs/big.md": "not needed", **sources}
        files = {
            "LICENSE.md": "MIT",
            "setup.cfg": "not needed",
            "vendor/llama.cpp/.git": "gitdir: ../nowhere",
        } | {f"vendor/llama.cpp/{name}": text for name, text in inside.items()}
        with tarfile.open(self.archive, "w:gz") as tar:
            for name, text in files.items():
                data = text.encode()
                member = tarfile.TarInfo(f"{STEM}/{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
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


# --- the series of the project on a llama.cpp that went on ---------------------------------------


def program() -> ModuleType:
    spec = spec_from_file_location("prepare", PREPARE)
    module = sys.modules["prepare"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare = program()
SERIES = prepare.read_series(prepare.HERE / "patches")
HOOKED = sorted({name for patch in SERIES for name, _ in patch.hunks()})
CACHE = ROOT / "build" / "vendor"
KEY = prepare.tree_key(prepare.Pin.read(prepare.HERE / "requirements.txt"), SERIES, False)
ALONE = os.environ | {"GIT_CEILING_DIRECTORIES": "/"}

needs_tree = pytest.mark.skipif(
    not (CACHE / KEY).is_dir() or shutil.which("git") is None,
    reason="the libraries were built from another tree, or git is not installed",
)


class Upstream:
    """The files of llama.cpp that the project's series changes, before and after it."""

    def __init__(self, path: Path):
        tree = prepare.make_tree(prepare.HERE / "requirements.txt", SERIES, CACHE)
        self.after = {name: (tree / name).read_text() for name in HOOKED}
        for name, text in self.after.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(text)
        for patch in reversed(SERIES):
            subprocess.run(["git", "apply", "-R", str(patch.path)], cwd=path, check=True, env=ALONE)
        self.before = {name: (path / name).read_text() for name in HOOKED}


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    return Upstream(tmp_path_factory.mktemp("upstream"))


@pytest.fixture
def next_release(vendor):
    """The project's series, for an archive of what becomes of the files that it changes."""
    for patch in SERIES:
        shutil.copyfile(patch.path, vendor.patches / patch.name)
    shutil.copyfile(prepare.HERE / "patches" / "series", vendor.patches / "series")
    return vendor


def functions(text: str) -> list[str]:
    """Cut a source after every brace that ends what began at the left margin."""
    return re.split(r"(?<=\n}\n)|(?<=\n};\n)", text)


def places(patch, file: str) -> list[str]:
    """Return what each hunk of a patch finds in a file."""
    _, _, of_file = patch.text.partition(f"+++ b/{file}\n")
    of_file = of_file.partition("\ndiff --git")[0].partition("\n-- \n")[0]
    hunks = re.split(r"^@@ .* @@.*\n", of_file, flags=re.MULTILINE)[1:]
    return [
        "".join(line[1:] for line in hunk.splitlines(keepends=True) if line[:1] in " -")
        for hunk in hunks
    ]


@needs_tree
def test_functions_that_moved_are_found(upstream, next_release):
    """Functions of libllama the other way round, after 300 lines: each hook is in its own.

    What ends a header is found at its end only, and the server's hunks lie close to each other.
    """
    added = "".join(f"// line {i}\n" for i in range(300))

    def moved(name: str, text: str) -> str:
        if not (name.startswith("src/") and name.endswith(".cpp")):
            return text
        return added + "".join(reversed(functions(text)))

    next_release.pack({name: moved(name, text) for name, text in upstream.before.items()})
    tree = next_release.tree(sdist=next_release.archive)
    for name, text in upstream.after.items():
        found = (tree / name).read_text().removeprefix(added)
        assert sorted(functions(found)) == sorted(functions(text)), name


@needs_tree
@pytest.mark.parametrize("patch", SERIES, ids=lambda patch: patch.name[:4])
def test_every_hunk_has_one_place(upstream, patch, tmp_path):
    """Where it stood elsewhere as well, a hook could land in the wrong function."""
    for name, text in upstream.before.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for before in SERIES[: SERIES.index(patch)]:
        prepare.apply_patch(before, tmp_path)
    for name in {name for name, _ in patch.hunks()}:
        found = places(patch, name)
        assert found, name
        for place in found:
            assert ("\n" + (tmp_path / name).read_text()).count(f"\n{place}") == 1, place


@needs_tree
@pytest.mark.parametrize("patch", SERIES, ids=lambda patch: patch.name[:4])
def test_functions_of_another_name_are_refused(upstream, next_release, patch):
    """What a hunk finds has another name now: no tree is made, and it says which patch and file."""
    for name in {name for name, _ in patch.hunks()}:
        words = re.findall(r"\w{4,}", places(patch, name)[-1])
        word = max((word for word in words if word in upstream.before[name]), key=len)
        renamed = upstream.before[name].replace(word, f"{word}_2")
        next_release.pack({**upstream.before, name: renamed})
        message = next_release.refusal(sdist=next_release.archive)
        assert "does not apply to llama.cpp" in message, word
        assert f"file that refuses is {name}" in message, word
