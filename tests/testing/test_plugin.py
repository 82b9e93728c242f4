"""The plugin, as its users have it: in a pytest of its own, whose words are read. And every program of its page."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "testing-your-code.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    """A pytest with no settings but its own. Its exit status, and what it said."""
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.timeout(240)
def test_every_program_of_the_page_passes(tmp_path: Path) -> None:
    for number, program in enumerate(PROGRAMS):
        (tmp_path / f"test_{number}.py").write_text(program)
    tests = sum(len(re.findall(r"^ *def test_", program, re.MULTILINE)) for program in PROGRAMS)
    status, said = run(tmp_path, "-v", "-rs")
    assert status == 0, said
    assert tests >= 15
    assert int(re.findall(r"(\d+) passed", said)[0]) > tests + 20  # those of the kit too
    assert "2 skipped" in said  # as that channel does not show its indexes


def test_what_the_page_says_of_the_first_test_is_so() -> None:
    first = PROGRAMS[0]
    assert len(first.splitlines()) == 3
    assert "import" not in first


LEAVING = """
import os

KEPT = []


def test_leaves_pages(gntalloc_domains):
    KEPT.append(gntalloc_domains.alice.share(2, pages=3))


def test_leaves_a_port(gntalloc_domains):
    KEPT.append(gntalloc_domains.bob.events.bind(1))


def test_leaves_a_descriptor(gntalloc_machine):
    KEPT.append(os.open(os.devnull, os.O_RDONLY))


def test_leaves_a_channel(gntalloc_channels):
    KEPT.append(gntalloc_channels.server.peek)  # the ends themselves are closed for it


def test_is_clean(gntalloc_channels):
    pass
"""


def test_what_is_left_is_an_error_that_says_what_and_whose(tmp_path: Path) -> None:
    (tmp_path / "test_leaving.py").write_text(LEAVING)
    status, said = run(tmp_path, "-W", "ignore")
    assert status == 1
    assert "5 passed, 3 errors" in said
    assert "after the test, gntalloc_domains: not everything was given back:" in said
    assert "  domain 1, this process: 3 pages granted to domain 2 (references 8-10), mapped by no peer" in said
    assert "  domain 2, this process: event channel port 5 bound" in said
    assert "after the test, gntalloc_machine: not everything was given back:" in said
    assert "  this process: +1 descriptors of /dev/null" in said
    assert "Traceback" not in said.split("short test summary")[0]
    assert "contextlib" not in said


def test_one_failure_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "test_failing.py").write_text(
        "def test_fails(gntalloc_domains):\n    kept = gntalloc_domains.alice.share(2)\n    assert kept is None\n"
        "def test_skips(gntalloc_channels):\n    import pytest\n    pytest.skip('not today')\n"
    )
    status, said = run(tmp_path, "-W", "ignore")
    assert status == 1
    assert "1 failed, 1 skipped" in said
    assert "error" not in said.split("short test summary")[1]


MARKED = """
import pytest

pytestmark = pytest.mark.gntalloc(limit=7, size=1024)


def test_of_the_module(gntalloc_channels, gntalloc_domains):
    assert gntalloc_domains.alice.limit == 7
    assert gntalloc_channels.server.sizes == (1024, 2048)


@pytest.mark.gntalloc(limit=9)
class TestClass:
    @pytest.mark.gntalloc(size=0, extensions=False)
    def test_the_nearest_holds(self, gntalloc_channels, gntalloc_domains):
        assert gntalloc_domains.bob.limit == 9
        assert not gntalloc_channels.server.extended

    @pytest.mark.gntalloc(strict=True)
    def test_strict(self, gntalloc_machine):
        with pytest.raises(OSError, match="strict"):
            gntalloc_machine.domain(5).share(5)


@pytest.mark.gntalloc(limits=9)
def test_unknown(gntalloc_machine):
    pass


@pytest.mark.gntalloc(64)
def test_without_a_name(gntalloc_machine):
    pass
"""


def test_settings_in_markers(tmp_path: Path) -> None:
    (tmp_path / "test_marked.py").write_text(MARKED)
    status, said = run(tmp_path, "--strict-markers")
    assert status == 1
    assert "3 passed, 2 errors" in said
    assert "@pytest.mark.gntalloc does not take limits=; it takes limit=, behaviour=," in said
    assert "@pytest.mark.gntalloc does not take 64;" in said


def test_unused_it_imports_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_unused.py").write_text(
        "import sys\ndef test_nothing_is_imported():\n"
        "    assert 'gntalloc_pytest' in sys.modules\n"
        "    assert [name for name in sys.modules if name.split('.')[0] == 'gntalloc'] == []\n"
    )
    assert run(tmp_path)[0] == 0
    status, said = run(tmp_path, "-p", "no:gntalloc")
    assert (status, "AssertionError" in said) == (1, True)
    assert "gntalloc_channels" in run(tmp_path, "--fixtures")[1]
    assert "@pytest.mark.gntalloc(limit, behaviour" in run(tmp_path, "--markers")[1]


def test_two_suites_at_once_have_machines_of_their_own(tmp_path: Path) -> None:
    """As the workers of pytest-xdist are: processes that know nothing of each other."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_same.py").write_text(
        "import pytest\n@pytest.mark.parametrize('number', range(8))\n"
        "def test_same(number, gntalloc_channels, gntalloc_domains):\n"
        "    gntalloc_domains.alice.store.write('data/x', str(number))\n"
        "    gntalloc_channels.server.send(b'x')\n    assert gntalloc_channels.client.recv(30) == b'x'\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    both = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for each in both:
        said, _ = each.communicate(timeout=100)
        assert "8 passed" in said
