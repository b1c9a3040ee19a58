"""What an index of packages shows of the README: files are named, and no link leads nowhere."""

from __future__ import annotations

import email
import os
import re
from pathlib import Path

import pytest
from scikit_build_core import build

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(([^)]*)\)")


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The description in the metadata that a build writes."""
    folder, before = tmp_path_factory.mktemp("metadata"), Path.cwd()
    os.chdir(ROOT)
    try:
        name = build.prepare_metadata_for_build_wheel(str(folder))
    finally:
        os.chdir(before)
    metadata = email.message_from_bytes((folder / name / "METADATA").read_bytes())
    assert metadata["Description-Content-Type"] == "text/markdown"
    body = metadata.get_payload(decode=True)
    assert isinstance(body, bytes)
    return body.decode("utf-8")


def test_links_lead_somewhere(described: str) -> None:
    links = LINK.findall(described)
    assert links
    assert all(link.startswith("https://") for link in links)


def test_files_are_named_and_there(described: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files = {link.partition("#")[0] for link in LINK.findall(readme) if ":" not in link}
    assert "docs/usage.md" in files
    for file in files:
        assert f"`{file}`" in described
        assert (ROOT / file).exists()


def test_the_rest_is_the_readme(described: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    without = [line for line in readme.splitlines() if "](" not in line]
    assert set(without) <= set(described.splitlines())
