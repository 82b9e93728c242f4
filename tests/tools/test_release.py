"""What must agree before anything is published: versions, headings, tags, links; and what is said of installing."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

import gntalloc

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEADINGS = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


@pytest.fixture(name="_git")
def needs_git() -> None:
    """Leave out what asks git, where there is none."""
    if shutil.which("git") is None:
        pytest.skip("there is no git (apt install git)")


def test_version_and_changelog_agree() -> None:
    assert PROJECT["version"] == gntalloc.__version__
    heading = re.fullmatch(r"(\S+) \((unreleased|\d{4}-\d{2}-\d{2})\)", HEADINGS[0])
    assert heading, HEADINGS[0]
    assert heading[1] == gntalloc.__version__
    versions = [tuple(map(int, each.split()[0].split("."))) for each in HEADINGS]
    assert versions == sorted(versions, reverse=True)


@pytest.mark.usefixtures("_git")
def test_a_version_that_is_tagged_has_a_date() -> None:
    """And the other way round: every heading but the newest is a release, so it has a date."""
    listed = subprocess.run(
        ["git", "tag", "-l", "v*"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=50
    )
    tags = listed.stdout.split()
    for heading in HEADINGS:
        if "unreleased" in heading:
            assert f"v{heading.split()[0]}" not in tags
    assert not any("unreleased" in heading for heading in HEADINGS[1:])


def for_an_index(text: str, links: str) -> str:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "tools" / "readme.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.for_an_index(text, links))


@pytest.mark.parametrize(
    ("links", "becomes"),
    [
        ("", "see the lab, `disk`, [X](https://x), [y](#y)"),
        (
            "https://h/v1/",
            "see [the lab](https://h/v1/docs/lab.md), [`disk`](https://h/v1/docs/disk.md#top), [X](https://x), [y](#y)",
        ),
    ],
)
def test_links_of_the_description(links: str, becomes: str) -> None:
    text = "see [the lab](docs/lab.md), [`disk`](docs/disk.md#top), [X](https://x), [y](#y)"
    assert for_an_index(text, links) == becomes


@pytest.mark.parametrize("links", ["", "https://host/v1/"])
def test_no_link_of_the_readme_is_left_relative(links: str) -> None:
    text = for_an_index((ROOT / "README.md").read_text(), links)
    assert re.findall(r"\]\((?![a-z]+:|#)[^)]*\)", text) == []
    assert "```python" in text


def test_the_docs_do_not_send_people_to_an_index_that_has_it_not() -> None:
    """Until it is published; docs/releasing.md says what to change then."""
    allowed = {"installing.md", "releasing.md"}
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        if page.name not in allowed:
            assert not re.search(r"pipx? install (-\S+ )*gntalloc\b(?!-)", page.read_text()), page


@pytest.fixture
def clone(tmp_path: Path, _git: None) -> Path:
    """Of what a release looks at, with a wheel that needs no building, ready to be released."""
    for name in ("pyproject.toml", "CHANGELOG.md", "src/gntalloc/__init__.py", "tools/release"):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    (tmp_path / "tools" / "wheel").write_text("#!/bin/sh\n")
    (tmp_path / "tools" / "wheel").chmod(0o755)
    change(tmp_path, "CHANGELOG.md", "(unreleased)", "(2026-01-31)")
    change(tmp_path, "pyproject.toml", 'links = ""', 'links = "https://host/v{version}/"')
    if "\n[project.urls]" not in (tmp_path / "pyproject.toml").read_text():
        change(
            tmp_path,
            "pyproject.toml",
            "[project.scripts]",
            '[project.urls]\nSource = "https://host"\n\n[project.scripts]',
        )
    git(tmp_path, "init", "-q")
    commit(tmp_path)
    return tmp_path


def change(folder: Path, name: str, old: str, new: str) -> None:
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new, 1))


def git(folder: Path, *words: str) -> str:
    identity = [
        "-c",
        "user.name=x",
        "-c",
        "user.email=x@example.org",
        "-c",
        "commit.gpgsign=false",
        "-c",
        "tag.gpgsign=false",
    ]
    return subprocess.run(
        ["git", *identity, *words], cwd=folder, capture_output=True, text=True, check=True, timeout=50
    ).stdout


def commit(folder: Path) -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "x", "--allow-empty")


def release(folder: Path) -> subprocess.CompletedProcess[str]:
    names = {"GIT_AUTHOR_NAME": "x", "GIT_COMMITTER_NAME": "x", "GIT_AUTHOR_EMAIL": "x@example.org"}
    environment = {**os.environ, **names, "GIT_COMMITTER_EMAIL": "x@example.org"}
    return subprocess.run(
        ["tools/release"], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=50
    )


def test_a_release_is_tagged_once(clone: Path) -> None:
    done = release(clone)
    assert done.returncode == 0, done.stderr
    assert git(clone, "tag").split() == [f"v{gntalloc.__version__}"]
    again = release(clone)
    assert again.returncode == 1
    assert "there is a tag" in again.stderr


@pytest.mark.parametrize(
    ("name", "old", "new", "reason"),
    [
        ("src/gntalloc/__init__.py", "__version__ =", '__version__ = "9.9.9"  #', "make them equal"),
        ("CHANGELOG.md", "(2026-01-31)", "(unreleased)", "CHANGELOG.md begins with"),
        ("CHANGELOG.md", f"## {gntalloc.__version__}", "## 9.9.9", "CHANGELOG.md begins with"),
        ("pyproject.toml", 'links = "https://host/v{version}/"', 'links = ""', "fill in links"),
        ("pyproject.toml", "\n[project.urls]", "\n[project.entry-points.x]", "no [project.urls]"),
    ],
)
def test_what_does_not_agree_is_refused(clone: Path, name: str, old: str, new: str, reason: str) -> None:
    change(clone, name, old, new)
    commit(clone)
    done = release(clone)
    assert done.returncode == 1
    assert reason in done.stderr
    assert git(clone, "tag") == ""


def test_a_tree_with_changes_is_refused(clone: Path) -> None:
    (clone / "new").touch()
    done = release(clone)
    assert done.returncode == 1
    assert "not committed" in done.stderr
